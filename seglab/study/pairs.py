"""Match the runs of two arms by their seed, and say which are left out and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from seglab.study.records import Record

Runs = Mapping[tuple[str, int], Record]
"""Ended runs by arm and seed."""

POINTS = 100
"""Figures are given in points of mIoU: hundredths."""


@dataclass(frozen=True)
class Pairs:
    """Differences treatment - control of one figure, seed by seed.

    Attributes:
        seeds: Of the pairs that count.
        differences: In points, in the order of `seeds`.
        left_out: Of all other planned seeds, the reason.
    """

    treatment: str
    control: str
    metric: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    left_out: Mapping[int, str]


def area(curve: Sequence[tuple[int, float]]) -> float:
    """Mean of a learning curve over its steps, by trapezoids; NaN for fewer than two steps.

    >>> area([(0, 0.0), (10, 0.5), (20, 0.5)])
    0.375
    """
    steps, values = np.array([*zip(*curve, strict=True)]) if curve else np.zeros((2, 0))
    width = np.ptp(steps) if len(steps) else 0
    return float(np.trapezoid(values, steps) / width) if width else math.nan


METRICS: dict[str, Callable[[Record], float]] = {
    "final": lambda record: record.final,
    "best": lambda record: record.best,
    "area": lambda record: area(record.curve),
}
"""What is compared: mIoU of the last validation, the largest, the mean over the learning curve."""


def figure(record: Record | None, metric: str) -> float:
    """A figure of a run in points; NaN if it is missing or did not finish."""
    if record is None or record.status != "finished" or not record.curve:
        return math.nan
    return POINTS * METRICS[metric](record)


def pair_runs(
    runs: Runs,
    treatment: str,
    control: str,
    seeds: Sequence[int],
    metric: str = "final",
    compared: Sequence[str] | None = None,
) -> Pairs:
    """Match two arms; see `Pairs`.

    Args:
        runs: All ended runs.
        treatment: Name of the arm whose figures are taken.
        control: Name of the arm whose figures are subtracted.
        seeds: Planned seeds.
        metric: One of `METRICS`.
        compared: Names in `Record.pairing` that must be equal; None for all, of which there must be
            one at least.
    """
    differences: dict[int, float] = {}
    left_out: dict[int, str] = {}
    for seed in seeds:
        first, second = runs.get((treatment, seed)), runs.get((control, seed))
        reason = (
            _unusable(first, treatment, metric)
            or _unusable(second, control, metric)
            or _unlike(first, second, metric, compared)
        )
        if reason:
            left_out[seed] = reason
        else:
            differences[seed] = figure(first, metric) - figure(second, metric)
    values = tuple(differences.values())
    return Pairs(treatment, control, metric, tuple(differences), values, left_out)


def _unlike(
    first: Record | None, second: Record | None, metric: str, compared: Sequence[str] | None
) -> str:
    """Why two runs are no pair; empty if they are one."""
    assert first is not None  # else they are unusable
    assert second is not None
    names = sorted({*first.pairing, *second.pairing}) if compared is None else compared
    if compared is None and not names:
        return "no digests were recorded that show that the two runs are a pair"
    unequal = [n for n in names if first.pairing.get(n, "") != second.pairing.get(n)]
    if unequal:
        return f"no pair: {' and '.join(unequal)} of {first.arm} and {second.arm} are not equal"
    if metric == "area" and _steps(first) != _steps(second):
        return f"{first.arm} and {second.arm} were validated at different steps"
    return ""


def _unusable(record: Record | None, arm: str, metric: str) -> str:
    if record is None:
        return f"{arm} has not ended yet"
    if record.status != "finished":
        return f"{arm} failed: {record.error or 'no error was recorded'}"
    if not record.curve:
        return f"{arm} has no validation"
    if metric == "area" and math.isnan(area(record.curve)):
        return f"the learning curve of {arm} has fewer than two steps or holds NaN"
    if not math.isfinite(figure(record, metric)):
        return f"the mIoU of {arm} is not a number"
    return ""


def _steps(record: Record) -> list[int]:
    return [step for step, _ in record.curve]
