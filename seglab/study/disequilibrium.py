"""Did the branches of a fusion differ in scale, and for how long? From each run's mechanism.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seglab.study.pairs import Runs
from seglab.study.records import run_folder

Floats = NDArray[np.float64]
FILE_NAME = "mechanism.csv"
QUANTITIES = ("std", "share", "gradient", "update")
NEAR = 0.1
"""Part of the final disequilibrium within which it counts as final."""


@dataclass(frozen=True)
class Traces:
    """What was measured at one fusion of one run.

    Attributes:
        steps: (n,), ascending.
        branches: Names, m.
        values: For each of `QUANTITIES`, (n, m); NaN where nothing was measured. The std is that
            of the branch at the concatenation, before its slice of the weight.
    """

    arm: str
    seed: int
    fusion: str
    steps: NDArray[np.int64]
    branches: tuple[str, ...]
    values: dict[str, Floats]


@dataclass(frozen=True)
class Mechanism:
    """One fusion in one arm; each figure is a median over the seeds, NaN if not measured.

    Attributes:
        n_runs: Runs that were measured.
        first_step: When the first measurement was made; `last_step` the last.
        std_ratio: Largest by smallest branch std, at the first and the last measurement.
        share_spread: Largest minus smallest share of the fused output's variance.
        gradient_ratio: Largest by smallest root mean square of a slice's gradient.
        update_ratio: Largest by smallest relative update of a slice.
        settled_step: From here on the ratio of stds is within a tenth of its last value.
    """

    arm: str
    fusion: str
    n_runs: int
    first_step: float
    last_step: float
    std_ratio: tuple[float, float]
    share_spread: tuple[float, float]
    gradient_ratio: tuple[float, float]
    update_ratio: tuple[float, float]
    settled_step: float


def read_all_traces(study: Path, runs: Runs) -> list[Traces]:
    """Traces of all finished runs that have any."""
    found: list[Traces] = []
    for (arm, seed), record in runs.items():
        path = run_folder(study, arm, seed) / FILE_NAME
        if record.status == "finished" and path.exists():
            found += read_traces(path, arm, seed)
    return found


def read_traces(path: Path, arm: str, seed: int) -> Iterator[Traces]:
    """Traces of one run, fusion by fusion."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for fusion in dict.fromkeys(row["fusion"] for row in rows):
        ours = [row for row in rows if row["fusion"] == fusion]
        steps = sorted({int(row["step"]) for row in ours})
        branches = list(dict.fromkeys(row["branch"] for row in ours))
        values = {name: np.full((len(steps), len(branches)), np.nan) for name in QUANTITIES}
        for row in ours:
            place = steps.index(int(row["step"])), branches.index(row["branch"])
            for name in QUANTITIES:
                values[name][place] = _number(row.get(name))
        yield Traces(arm, seed, fusion, np.array(steps), tuple(branches), values)


def summarize(traces: Sequence[Traces]) -> list[Mechanism]:
    """Summaries of every fusion in every arm."""
    groups: dict[tuple[str, str], list[Traces]] = {}
    for each in traces:
        groups.setdefault((each.fusion, each.arm), []).append(each)
    return [_summary(arm, fusion, members) for (fusion, arm), members in groups.items()]


def _summary(arm: str, fusion: str, runs: Sequence[Traces]) -> Mechanism:
    def ends(quantity: str) -> tuple[float, float]:
        measured = [_first_and_last(disequilibrium(run, quantity)) for run in runs]
        return _median([first for first, _ in measured]), _median([last for _, last in measured])

    return Mechanism(
        arm,
        fusion,
        len(runs),
        _median([float(run.steps[0]) for run in runs]),
        _median([float(run.steps[-1]) for run in runs]),
        ends("std"),
        ends("share"),
        ends("gradient"),
        ends("update"),
        _median([settled_step(run.steps, disequilibrium(run, "std")) for run in runs]),
    )


def disequilibrium(run: Traces, quantity: str) -> Floats:
    """How far the branches are apart at each step, (n,).

    The largest by the smallest; of shares, which add up to one, the largest minus the smallest. NaN
    where a branch was not measured.
    """
    high, low = run.values[quantity].max(1), run.values[quantity].min(1)
    if quantity == "share":
        return np.asarray(high - low)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(high / low)


def settled_step(steps: NDArray[np.int64], values: Floats) -> float:
    """First step from which on all values are within a tenth of the last; NaN without values.

    >>> settled_step(np.array([0, 10, 20, 30]), np.array([4.0, 2.1, 2.05, 2.0]))
    10.0
    """
    kept = np.isfinite(values)
    steps, values = steps[kept], values[kept]
    if not len(values):
        return math.nan
    away = np.flatnonzero(np.abs(values - values[-1]) > NEAR * abs(values[-1]))
    return float(steps[away[-1] + 1] if len(away) else steps[0])


def _first_and_last(values: Floats) -> tuple[float, float]:
    kept = values[~np.isnan(values)]
    return (float(kept[0]), float(kept[-1])) if len(kept) else (math.nan, math.nan)


def _median(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return float(np.median(kept)) if kept else math.nan


def _number(text: str | None) -> float:
    return float(text) if text else math.nan
