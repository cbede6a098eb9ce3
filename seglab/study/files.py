"""Write study.json, every figure, and study.csv, one row per run."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from seglab.study.comparisons import Comparison
from seglab.study.findings import Analysis
from seglab.study.pairs import METRICS, POINTS, figure
from seglab.study.reading import StudyRuns

UNIT = "points of mIoU (hundredths); p-values and steps as they are"


def write_files(found: Analysis) -> None:
    """Write study.json and study.csv into the study's folder."""
    folder = found.study.folder
    text = json.dumps(plain(as_mapping(found)), indent=1, allow_nan=False)
    (folder / "study.json").write_text(text + "\n", encoding="utf-8")
    write_rows(found.study, folder / "study.csv")


def as_mapping(found: Analysis) -> dict[str, Any]:
    """What study.json holds, but for NaN."""
    study = found.study
    return {
        "unit": UNIT,
        "margin": found.margin,
        "primary": {
            "treatment": study.treatment,
            "control": study.control,
            "metric": study.metric,
            "verdict": found.primary.verdict,
        },
        "runs": {
            "planned": len(study.arms) * len(study.seeds),
            "finished": len(study.runs) - len(study.failed),
            "failed": [{"arm": r.arm, "seed": r.seed, "error": r.error} for r in study.failed],
            "missing": [{"arm": arm, "seed": seed} for arm, seed in study.missing],
        },
        "remarks": study.remarks,
        "comparisons": [_flat(each) for each in found.comparisons],
        "classes": found.classes,
        "mechanism": found.mechanism,
    }


def _flat(found: Comparison) -> dict[str, Any]:
    values = asdict(found)
    return {**values.pop("pairs"), "n_pairs": found.n_pairs, **values}


def plain(value: Any) -> Any:
    """Values as JSON knows them: what is not finite becomes null.

    >>> plain({3: (1.0, float("nan"))})
    {'3': [1.0, None]}
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_rows(study: StudyRuns, path: Path) -> None:
    """Write one row per planned run: figures in points, empty where there is none."""
    classes = list(dict.fromkeys(name for run in study.runs.values() for name in run.per_class))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["arm", "seed", "status", "error", *METRICS, "seconds", *(f"IoU {c}" for c in classes)]
        )
        writer.writerows(
            _row(study, arm, seed, classes) for arm in study.arms for seed in study.seeds
        )


def _row(study: StudyRuns, arm: str, seed: int, classes: list[str]) -> list[Any]:
    run = study.runs.get((arm, seed))
    if run is None:
        return [arm, seed, "missing", "", *[""] * (len(METRICS) + 1 + len(classes))]
    ious = [run.per_class.get(name) for name in classes] if run.status == "finished" else []
    values = [figure(run, metric) for metric in METRICS]
    values += [math.nan if iou is None else POINTS * iou for iou in ious or [None] * len(classes)]
    cells = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
    n = len(METRICS)
    return [arm, seed, run.status, run.error, *cells[:n], f"{run.seconds:.1f}", *cells[n:]]
