"""Rows of a report as a table of at most 100 columns; every name can be read in full."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

WIDTH = 100
_LEFT = ("fusion", "from", "upsampling")
_HEADINGS = ("fusion", "branch", "channels", "from", "upsampling", "mean", "std", "scale")
_GAP = "  "

Row = Mapping[str, Any]


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Aligned columns.

    Where they would be too wide, the beginning that all names share is said once above them and
    the name of a fusion stands above its branches; where a name is too long even then, it goes on
    in the next line.
    """
    whole = _as_columns(rows)
    if max(map(len, whole)) <= WIDTH:
        return whole
    shared = _shared_beginning([row[key] for row in rows for key in ("fusion", "source")])
    said = _broken(f"all names begin with {shared}", WIDTH) if shared else []
    short = [
        {**row, **{key: row[key].removeprefix(shared) for key in ("fusion", "source")}}
        for row in rows
    ]
    columns = _as_columns(short)
    return [*said, *(columns if max(map(len, columns)) <= WIDTH else _under_headlines(short))]


def _as_columns(rows: Sequence[Row]) -> list[str]:
    """A fusion's name stands at its first branch."""
    names = [row["fusion"] for row in rows]
    firsts = [i == 0 or names[i - 1] != name for i, name in enumerate(names)]
    body = [
        (row["fusion"] if first else "", *_cells(row))
        for row, first in zip(rows, firsts, strict=True)
    ]
    lines = _aligned([_HEADINGS, *body])
    notes = [f"{_GAP}{row['note']}" if row["note"] else "" for row in rows]
    return [line + note for line, note in zip(lines, ["", *notes], strict=True)]


def _under_headlines(rows: Sequence[Row]) -> list[str]:
    """A fusion's name stands above its branches, a note below its branch."""
    others = [(*line[:2], *line[3:]) for line in (_HEADINGS[1:], *map(_cells, rows))]
    room = WIDTH - max(map(len, _aligned(others))) - len(_GAP)
    pieces = [_broken(row["source"] or "input", room) for row in rows]
    cells = [
        _cells({**row, "source": first}) for row, (first, *_) in zip(rows, pieces, strict=True)
    ]
    head, *lines = _aligned([_HEADINGS[1:], *cells])
    at = head.index("from")
    found = [head]
    numbered = zip(rows, lines, pieces, strict=True)
    for name, group in groupby(numbered, key=lambda item: str(item[0]["fusion"])):
        first, *more = _broken(name, WIDTH - len(_GAP))
        found += [first, *(_GAP + piece for piece in more)]
        for row, line, (_, *rest) in group:
            found += [line, *(" " * at + piece for piece in rest)]
            found += [f"{_GAP * 2}{row['note']}"] if row["note"] else []
    return found


def _cells(row: Row) -> tuple[str, ...]:
    resized = f"{row['upsampling']:.3g}x {row['interpolation']}" if row["interpolation"] else "-"
    return (
        str(row["branch"]),
        f"{row['start']}:{row['stop']}",
        row["source"] or "input",
        resized,
        f"{row['mean']:.4f}",
        f"{row['std']:.4f}",
        f"{row['scale']:.4f}",
    )


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of padded columns; the first holds the headings."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        _GAP.join(
            text.ljust(width) if heading in _LEFT else text.rjust(width)
            for heading, text, width in zip(cells[0], line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]


def _shared_beginning(names: Sequence[str]) -> str:
    """The dotted beginning of all names, with its dot; each keeps its last part."""
    parts = [name.split(".")[:-1] for name in names if name]
    shared = []
    for same in zip(*parts, strict=False):
        if len({*same}) > 1:
            break
        shared.append(f"{same[0]}.")
    return "".join(shared)


def _broken(name: str, room: int) -> list[str]:
    """Pieces of a dotted name of at most `room` characters, broken after dots where there are."""
    pieces: list[str] = []
    for part in _parts(name):
        if pieces and len(pieces[-1]) + len(part) <= room:
            pieces[-1] += part
        else:
            pieces += [part[i : i + room] for i in range(0, len(part), room)]
    return pieces


def _parts(name: str) -> Iterator[str]:
    *parents, last = name.split(".")
    yield from (f"{parent}." for parent in parents)
    if last:
        yield last
