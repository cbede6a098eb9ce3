"""Read what a run left in its folder, and the evaluations of its checkpoints beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from seglab.reporting.file_names import COUNTS, EXTREMES, SCALE_REPORT

Curve = tuple[list[float], list[float]]
"""Steps and values."""


class ReportError(ValueError):
    """A folder of which no report can be made."""


class Interval(NamedTuple):
    """A figure and the ends of its 95 % interval, as fractions."""

    value: float
    low: float
    high: float


class Counts(NamedTuple):
    """Counts of every image, see `seglab.image_scores.count_images`."""

    names: list[str]
    values: NDArray[np.int64]  # (N, 3, K)
    class_names: list[str]


@dataclass(frozen=True)
class Evaluation:
    """What one validation or test left.

    Attributes:
        folder: Where.
        results: Of results.json.
        remarks: What does not fit together, a sentence each.
        intervals: By figure and class, "" being the set's own; empty if there are none.
        confusion: Counts (K, K), rows being labels; None if there is none.
        extremes: Of extremes.json.
    """

    folder: Path
    results: Mapping[str, Any]
    remarks: tuple[str, ...] = ()
    intervals: Mapping[tuple[str, str], Interval] = field(default_factory=dict)
    confusion: NDArray[np.int64] | None = None
    extremes: tuple[Mapping[str, Any], ...] = ()

    @property
    def split(self) -> str:
        """Either "val" or "test"."""
        return str(self.results["split"])

    @property
    def title(self) -> str:
        """What was evaluated, and when."""
        name = {"val": "Validation", "test": "Test"}.get(self.split, self.split)
        return f"{name} after {self.results['step']} steps"

    @cached_property
    def counts(self) -> Counts | None:
        """Counts of each image; None if there are none."""
        path = self.folder / COUNTS
        if self.remarks or not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            return Counts(
                file["names"].tolist(), file["counts"], [str(n) for n in file["class_names"]]
            )


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        folder: Where.
        config_text: Of config.yaml; "" if there is none.
        evaluations: Its own last one first, then those of its checkpoints.
        curves: Columns of metrics.csv.
        scales: Of scale_equalization.json; empty if there is none.
        pictures: Grids of its validations, the first first.
        checkpoint: The best, else the last; None if there is none.
    """

    folder: Path
    config_text: str
    evaluations: tuple[Evaluation, ...]
    curves: Mapping[str, Curve]
    scales: Mapping[str, Any]
    pictures: tuple[Path, ...]
    checkpoint: Path | None

    @property
    def name(self) -> str:
        """Experiment and number, as in `camvid/upernet_resnet18/version_0`."""
        parts = self.folder.resolve().parts
        start = len(parts) - 1 - parts[::-1].index("logs") + 1 if "logs" in parts else -2
        return "/".join(parts[start:] or parts[-2:])

    @cached_property
    def config(self) -> dict[str, Any]:
        """Sections and values."""
        return yaml.safe_load(self.config_text) or {}

    @property
    def results(self) -> Mapping[str, Any]:
        """Of the run itself; empty if it has not ended."""
        own = [item for item in self.evaluations if item.folder == self.folder]
        return own[0].results if own else {}

    def evaluation(self, split: str) -> Evaluation | None:
        """An evaluation of a split: the run's own, or else that of one of its checkpoints."""
        return next((item for item in self.evaluations if item.split == split), None)


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        ReportError: It is no run's folder, or nothing has been trained or evaluated in it.
    """
    config, metrics = folder / "config.yaml", folder / "metrics.csv"
    _require_run(folder, config, metrics)
    own = [folder, *_evaluations_beside(folder)]
    evaluations = [read_evaluation(place) for place in own if (place / "results.json").is_file()]
    scales = folder / SCALE_REPORT
    checkpoints = [folder / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    others = sorted(folder.glob("checkpoints/*.ckpt"))
    return Run(
        folder,
        config.read_text(encoding="utf-8") if config.is_file() else "",
        tuple(evaluations),
        _read_curves(metrics) if metrics.is_file() else {},
        json.loads(scales.read_text(encoding="utf-8")) if scales.is_file() else {},
        tuple(sorted(folder.glob("pictures/step_*.png"))),
        next((path for path in [*checkpoints, *others] if path.is_file()), None),
    )


def _require_run(folder: Path, config: Path, metrics: Path) -> None:
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder of a run: report takes logs/.../version_N")
    left = (folder / "results.json").is_file() or metrics.is_file()
    if left and (config.is_file() or (folder / "results.json").is_file()):
        return
    inside = {
        path.parent for name in ("results.json", "metrics.csv") for path in folder.rglob(name)
    }
    hint = f"; runs in it: {', '.join(map(str, sorted(inside)[-3:]))}" if inside else ""
    raise ReportError(f"{folder} has neither results.json nor config.yaml and metrics.csv{hint}")


def _evaluations_beside(folder: Path) -> list[Path]:
    """The newest `validate_N` and `test_N` beside a run that evaluated one of its checkpoints."""
    found = []
    for command in ("validate", "test"):
        places = sorted(folder.parent.glob(f"{command}_*"), key=_number_of)
        mine = [place for place in places if place != folder and _is_of(place, folder)]
        found += mine[-1:]
    return found


def _number_of(place: Path) -> int:
    number = place.name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1


def _is_of(evaluation: Path, run: Path) -> bool:
    config, results = evaluation / "config.yaml", evaluation / "results.json"
    if not (config.is_file() and results.is_file()):
        return False
    checkpoint = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("ckpt_path")
    if not checkpoint:
        return False
    place = Path(checkpoint).parent.parent
    if place.is_dir():
        return place.resolve() == run.resolve()
    return place.parts[-2:] == run.resolve().parts[-2:]  # logs that were moved


def read_evaluation(folder: Path) -> Evaluation:
    """Read an evaluation's files, leaving out those that are not of the same evaluation.

    Raises:
        ReportError: results.json is not one.
    """
    results = _read_results(folder / "results.json")
    names = [row["name"] for row in results["classes"]]
    intervals = _read_intervals(folder / "intervals.csv")
    miou, told = results.get("mIoU"), intervals.get(("mIoU", ""))
    if told is not None and (miou is None or not abs(told.value - miou) < 1e-4):
        remark = (
            "intervals.csv, confusion.csv and images.csv are of another evaluation than"
            " results.json and are left out"
        )
        return Evaluation(folder, results, (remark,))
    extremes = folder / EXTREMES
    return Evaluation(
        folder,
        results,
        (),
        intervals,
        _read_confusion(folder / "confusion.csv", names),
        tuple(json.loads(extremes.read_text(encoding="utf-8"))) if extremes.is_file() else (),
    )


def _read_results(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        [row["name"] for row in found["classes"]]
        found["split"], found["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is not what a run leaves ({error!r}): evaluate again") from None
    return dict(found)


def _read_intervals(path: Path) -> dict[tuple[str, str], Interval]:
    rows = _rows(path)
    cells = ("value", "low", "high")
    return {
        (row["figure"], row["class"]): Interval(*(_number(row[cell]) for cell in cells))
        for row in rows
    }


def _read_confusion(path: Path, names: list[str]) -> NDArray[np.int64] | None:
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    if [row[0] for row in rows] != names:
        raise ReportError(f"{path} has other classes than results.json: evaluate again")
    return np.array([row[1:] for row in rows], np.int64)


def _read_curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for row in _rows(path):
        for name, text in row.items():
            if text and name != "step":
                steps, values = curves.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(_number(text))
    return curves


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _number(text: str) -> float:
    return float(text) if text else float("nan")
