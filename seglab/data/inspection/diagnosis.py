"""What the doctor found: plain data that prints as tables and a verdict; a leaf."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SplitSummary:
    """Counts of one split; the tuples have one entry per class."""

    name: str
    n_images: int
    n_unreadable: int
    shapes: dict[tuple[int, int], int]  # (height, width) -> images, commonest first
    n_ignored: int  # pixels
    n_pixels: tuple[int, ...]
    n_images_with: tuple[int, ...]

    @property
    def n_all_pixels(self) -> int:
        """Pixels of all readable masks."""
        return max(1, sum(self.n_pixels) + self.n_ignored)


@dataclass(frozen=True)
class Diagnosis:
    """Tables and a verdict.

    Args:
        class_names: Names of the classes, by id.
        splits: Counts of each split.
        faults: What must be mended; none for a sound data set.
        notes: What may be intended.
        bands: Lines of a config that normalize the bands, for images that are no 8-bit RGB.
    """

    class_names: tuple[str, ...]
    splits: tuple[SplitSummary, ...]
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bands: str = ""

    def __str__(self) -> str:
        lists = [
            f"{title}:\n" + "\n".join(f"  - {line}" for line in lines)
            for title, lines in (("faults", self.faults), ("notes", self.notes))
            if lines
        ]
        verdict = f"{len(self.faults)} fault(s)" if self.faults else "sound: no faults"
        tables = [_align(self._split_rows()), _align(self._class_rows())]
        if self.bands:
            tables.append(f"bands, for model.network.init_args:\n{self.bands}")
        return "\n\n".join([*tables, *lists, f"verdict: {verdict}"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        plain = asdict(self)
        for split in plain["splits"]:
            split["shapes"] = [
                {"height": height, "width": width, "images": count}
                for (height, width), count in split["shapes"].items()
            ]
        return plain

    def _split_rows(self) -> list[list[str]]:
        rows = [["split", "images", "unreadable", "ignored", "sizes (width x height)"]]
        rows += [
            [
                split.name,
                str(split.n_images),
                str(split.n_unreadable),
                f"{split.n_ignored / split.n_all_pixels:.1%}",
                _describe_shapes(split.shapes),
            ]
            for split in self.splits
        ]
        return rows

    def _class_rows(self) -> list[list[str]]:
        head = [cell for split in self.splits for cell in (f"{split.name} pixels", "images")]
        rows = [["id", "class", *head]]
        for label, name in enumerate(self.class_names):
            cells = [
                cell
                for split in self.splits
                for cell in (
                    f"{split.n_pixels[label] / split.n_all_pixels:.3%}",
                    str(split.n_images_with[label]),
                )
            ]
            rows.append([str(label), name, *cells])
        return rows


def _describe_shapes(shapes: dict[tuple[int, int], int]) -> str:
    """Name all sizes if they are few, otherwise their range."""
    if len(shapes) <= 3:
        return ", ".join(f"{width}x{height} ({n})" for (height, width), n in shapes.items())
    heights, widths = zip(*shapes, strict=True)
    return f"{len(shapes)} sizes, {min(widths)}..{max(widths)} x {min(heights)}..{max(heights)}"


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def _is_number(cell: str) -> bool:
    return cell.rstrip("%").replace(".", "").isdigit()
