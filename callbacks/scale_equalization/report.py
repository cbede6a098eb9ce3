"""What was found, measured and changed, as rows, a table and JSON; knows no logger and no plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from .fusion import Branch, Fusion, Refusal
from .table import table_lines


@dataclass(frozen=True)
class Measure:
    """Statistics of one branch over all samples, channels and pixels, and what follows from them.

    Attributes:
        mean: Mean of the branch just before the concatenation.
        std: Population standard deviation there.
        scale: What the consumer's slice is, or would be, multiplied by.
        count: Number of values measured.
        precision: Half-width of the 95 % confidence interval of `std`, relative to it.
        note: Why the branch is left alone; "" if it is not.
    """

    mean: float
    std: float
    scale: float
    count: int
    precision: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Summand:
    """One side of a sum fusion.

    Attributes:
        source: Module that made the map.
        producer: Module whose weight and bias were, or would be, scaled; "" if none could be.
        mean: Mean of the map just before the addition.
        std: Population standard deviation there.
        scale: What the edge weight, or the producer's weight and bias, are multiplied by; else 1.
        count: Number of values measured.
    """

    source: str
    producer: str
    mean: float
    std: float
    scale: float
    count: int


@dataclass(frozen=True)
class SumMeasure:
    """A sum fusion.

    Attributes:
        name: The module it happens in.
        summands: Two, or as many as there are edge weights.
        weights: The edge weights before the change, if they are multiplied by the scales; ().
    """

    name: str
    summands: tuple[Summand, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Report:
    """The outcome of one equalization.

    Attributes:
        fusions: The fusions measured, in forward order.
        measures: For each fusion, one measure for each branch.
        refusals: Fusions seen and left alone, with the reason.
        notes: Remarks on the calibration, one sentence each.
        mode: "fold", "reparametrize", or "off" for measured only.
        center: Whether the means were folded into the biases too.
        batches: Number of batches measured, over all ranks.
        sums: Sum fusions, if they were asked for.
    """

    fusions: tuple[Fusion, ...]
    measures: tuple[tuple[Measure, ...], ...]
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    mode: str = "off"
    center: bool = False
    batches: int = 0
    sums: tuple[SumMeasure, ...] = ()

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """One mapping for each branch: fusion, branch, start, stop, mean, std, scale, count, ...

        Zeros that no feature map fills are no branch, and have none.
        """
        return tuple(
            {"fusion": fusion.name, "branch": index, **_described(branch), **asdict(measure)}
            for fusion, measures in zip(self.fusions, self.measures, strict=True)
            for index, (branch, measure) in enumerate(zip(fusion.branches, measures, strict=True))
            if not (branch.blank and measure.note)
        )

    def without(self, refusals: Sequence[Refusal]) -> Report:
        """The report with some fusions left alone."""
        names = {refusal.name for refusal in refusals}
        pairs = zip(self.fusions, self.measures, strict=True)
        kept = [(fusion, group) for fusion, group in pairs if fusion.name not in names]
        return replace(
            self,
            fusions=tuple(fusion for fusion, _ in kept),
            measures=tuple(group for _, group in kept),
            refusals=(*self.refusals, *refusals),
        )

    def scales(self, fusion: Fusion) -> tuple[float, ...]:
        """What each slice of a fusion's weight is multiplied by."""
        return tuple(measure.scale for measure in self.measures[self.fusions.index(fusion)])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers."""
        return {**asdict(self), "rows": list(self.rows)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        return cls(
            fusions=tuple(_fusion(item) for item in values["fusions"]),
            measures=tuple(tuple(Measure(**m) for m in group) for group in values["measures"]),
            refusals=tuple(Refusal(**item) for item in values["refusals"]),
            notes=tuple(values["notes"]),
            mode=values["mode"],
            center=values["center"],
            batches=values["batches"],
            sums=tuple(
                SumMeasure(
                    item["name"],
                    tuple(Summand(**s) for s in item["summands"]),
                    tuple(item.get("weights", ())),
                )
                for item in values.get("sums", ())
            ),
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the report as JSON, making parent folders; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    def __str__(self) -> str:
        done = {"off": "measured only", "fold": "folded into the weights"}.get(
            self.mode, "applied as a reparametrization"
        )
        head = f"Scale equalization: {len(self.rows)} branches of {len(self.fusions)} fusions"
        head += f", {len(self.sums)} sums" if self.sums else ""
        lines = [f"{head}, {self.batches} batches, {done}", *table_lines(self.rows)]
        lines += [_sum_line(measure) for measure in self.sums]
        lines += _refusal_lines(self.refusals)
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def _described(branch: Branch) -> dict[str, Any]:
    values = asdict(branch)
    del values["blank"], values["feature_map"]
    return values


def _fusion(values: Mapping[str, Any]) -> Fusion:
    branches = tuple(Branch(**branch) for branch in values["branches"])
    lists = {k: tuple(values[k]) for k in ("weight_shape", "upstream")}
    lists["joined"] = tuple(tuple(widths) for widths in values.get("joined", ()))
    return Fusion(**{**values, **lists, "branches": branches})


def _refusal_lines(refusals: Sequence[Refusal]) -> list[str]:
    """One line for each reason; where it holds for many layers, the first few are named."""
    by_reason: dict[str, list[str]] = {}
    for refusal in refusals:
        by_reason.setdefault(refusal.reason, []).append(refusal.name)
    return [
        f"left alone: {', '.join(names[:3])}{_and_more(len(names) - 3)}: {reason}"
        for reason, names in by_reason.items()
    ]


def _and_more(n: int) -> str:
    return f" and {n} more" if n > 0 else ""


def _sum_line(measure: SumMeasure) -> str:
    fixed = " (fixed)"
    sides = (
        f"{s.source or 'input'} std {s.std:.4f}"
        + (f" ({s.producer or 'edge'} x {s.scale:.4f})" if s.producer or measure.weights else fixed)
        for s in measure.summands
    )
    return f"sum in {measure.name or 'the model'}: {' + '.join(sides)}"
