"""Folders of studies with known differences between the arms, as if networks had been trained."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from seglab.study.records import Record, run_folder

Run = tuple[str, int]
N_PIXELS = 2000
STEPS = (100, 200, 300, 400)
CLASSES = ("road", "sky", "car", "absent")
MECHANISM = ("step", "fusion", "branch", "std", "share", "gradient", "update")


def write_study(
    folder: Path,
    arms: Mapping[str, float],
    n_seeds: int = 8,
    *,
    primary: Mapping[str, Any] | None = None,
    failed: Collection[Run] = (),
    missing: Collection[Run] = (),
    unpaired: Collection[Run] = (),
    spread: float = 0.01,
    n_images: int = 12,
) -> Path:
    """Write a study's folder.

    Args:
        folder: Made if it does not exist.
        arms: How many more pixels are found than by the control, as a fraction; the control first.
        n_seeds: Seeds 0, 1, ...
        primary: Of the plan; by default the second arm against the first, by the final mIoU.
        failed: Runs that failed.
        missing: Runs that have not ended.
        unpaired: Runs that began with other weights.
        spread: Standard deviation of an arm's fraction over seeds.
        n_images: Of the validation set.
    """
    control, treatment, *_ = [*arms, *arms]
    plan = {
        "arms": {arm: {} for arm in arms},
        "seeds": list(range(n_seeds)),
        "primary": primary or {"arm": treatment, "reference": control, "metric": "final"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    for index, (arm, effect) in enumerate(arms.items()):
        for seed in range(n_seeds):
            if (arm, seed) in missing:
                continue
            random = np.random.default_rng([index, seed])
            found = 0.8 + effect + spread * random.standard_normal()
            kind = "failed" if (arm, seed) in failed else "finished"
            weights = f"{arm} {seed}" if (arm, seed) in unpaired else f"{seed}"
            _write_run(folder, Run((arm, seed)), kind, found, weights, n_images)
    return folder


def draw_counts(found: float, n_images: int, seed: int) -> np.ndarray:
    """Counts (n, 3, K): a fraction of each class's pixels is found, others become the next class.

    The pixels of the images are the same whatever is found; the last class is nowhere.
    """
    random = np.random.default_rng(seed)
    labelled = random.multinomial(N_PIXELS, [0.6, 0.3, 0.1], n_images)
    hits = np.round(labelled * np.clip(found - 0.1 * random.random((n_images, 1)), 0, 1))
    predicted = hits + np.roll(labelled - hits, 1, axis=1)
    counts = np.stack([hits, labelled, predicted], 1).astype(np.int64)
    return np.pad(counts, ((0, 0), (0, 0), (0, 1)))


def iou(counts: np.ndarray) -> np.ndarray:
    """IoU of each class from summed counts; NaN for what is nowhere."""
    hits, labelled, predicted = counts.sum(0).astype(float)
    either = labelled + predicted - hits
    return np.where(either > 0, hits / np.where(either > 0, either, 1), np.nan)


def _write_run(
    study: Path, run: Run, status: Any, found: float, weights: str, n_images: int
) -> None:
    arm, seed = run
    counts = draw_counts(found, n_images, seed=7)
    values = iou(counts)
    final = float(np.nanmean(values))
    curve = tuple(
        (step, final * (1 - 0.5 ** (i + 1)) / (1 - 0.5**4)) for i, step in enumerate(STEPS)
    )
    folder = run_folder(study, arm, seed)
    record = Record(
        arm, seed, status,
        error="CUDA out of memory" if status == "failed" else "",
        seconds=60.0 + seed,
        pairing={"initial weights": weights, "training data": str(seed)},
        curve=curve[:2] if status == "failed" else curve,
        per_class={
            name: None if np.isnan(value) else float(value)
            for name, value in zip(CLASSES, values, strict=True)
        },
    )  # fmt: skip
    record.write(folder)
    if status == "finished":
        names = np.array([f"image_{i:03d}" for i in range(n_images)])
        np.savez_compressed(folder / "counts.npz", names=names, counts=counts)
        write_mechanism(folder / "mechanism.csv", arm, seed)


def write_mechanism(path: Path, arm: str, seed: int) -> None:
    """Two branches whose stds are 4 apart and come together; none are in arm `fold`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(MECHANISM)
        for step in (0, *STEPS):
            apart = 1.0 if arm == "fold" else 1 + 3 * 0.5 ** (step / 100)
            share = apart**2 / (1 + apart**2)
            for branch, std, part in ((0, apart, share), (1, 1.0, 1 - share)):
                row = [step, "head.fusion", branch, std * (1 + 0.01 * seed), part, std * 0.1]
                writer.writerow([*row, "" if step == 0 else std * 1e-3])


def rewrite(folder: Path, **changes: Any) -> None:
    """Change values of a run's record."""
    path = folder / "run.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))


def as_written(record: Record) -> dict[str, Any]:
    """A record as JSON holds it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(record)))
    return found
