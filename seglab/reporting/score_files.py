"""What an evaluation leaves beside its table: confusion, scores per image, confidence intervals."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from seglab.calibration import N_BINS, reliability
from seglab.extra_metrics import extra_figures
from seglab.image_scores import bootstrap, count_images, figures
from seglab.visualize import Pixels, save_picture

PER_CLASS = ("IoU", "Acc", "Precision", "Dice", "BoundaryIoU", "share")
AREAS, LOSS = "areas", "loss"  # beside the extra metrics: what is counted of each image
_CELL, _SIDE = 24, 1200  # largest side of a cell and usual side of the picture, pixels

Arrays = dict[str, NDArray[np.float64]]


class ScoreFiles(Callback):
    """Writes what an evaluation says of single images and of the images' spread.

    `images.csv`, `intervals.csv`, `confusion.csv`, `confusion.png`, and `calibration.csv` where
    calibration is asked for.
    """

    split = "test"  # of the task's metrics

    def __init__(self) -> None:
        self._names: list[str] = []
        self.counts: dict[str, list[torch.Tensor]] = {}
        self.intervals: dict[str, tuple[float, float]] = {}
        """Of each average, the ends of its 95 % interval, after an evaluation, on rank 0."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier evaluation."""
        self._begin("test")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_test_start`."""
        self._begin("val")

    def _begin(self, split: str) -> None:
        self.split = split
        self._names, self.counts, self.intervals = [], {}, {}

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the images of a batch, on their device."""
        n_classes: Any = pl_module.num_classes
        counts = {AREAS: count_images(outputs["prediction"], batch["mask"], n_classes)}
        losses = outputs.get("losses")
        if losses is not None:
            counts[LOSS] = torch.stack((losses.detach(), torch.ones_like(losses)), dim=1)
        for kind, found in (counts | outputs.get("extra", {})).items():
            self.counts.setdefault(kind, []).append(found)
        self._names += batch["name"]

    def on_validation_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """As `on_test_batch_end`."""
        if not trainer.sanity_checking:
            self.on_test_batch_end(trainer, *arguments)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_test_end`."""
        if not trainer.sanity_checking:
            self.on_test_end(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, on rank 0."""
        log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: every rank must ask
        names, counts = _gather(self._names, self.counts, trainer.world_size)
        self._names, self.counts = [], {}
        task: Any = pl_module
        with task.metrics[self.split].sync_context():  # the sum over all ranks, which must all ask
            confusion = task.metrics[self.split].confusion.cpu().numpy()
        if getattr(trainer, "fast_dev_run", False) or not names or not trainer.is_global_zero:
            return
        ends = _ends(counts) if len(names) > 1 else {}
        self.intervals = {
            key: (float(pair[0]), float(pair[1])) for key, pair in ends.items() if pair.ndim == 1
        }
        if log_dir is None:
            return
        folder = Path(str(log_dir))
        self._write(folder, names, counts, task)
        values = derive({kind: found.sum(0) for kind, found in counts.items()})
        if ends:
            write_intervals(folder / "intervals.csv", values, ends, task.class_names)
        write_confusion(folder, confusion, task.class_names)

    def _write(
        self, folder: Path, names: list[str], counts: dict[str, torch.Tensor], task: Any
    ) -> None:
        write_images(folder / "images.csv", names, counts)
        if "calibration" in counts:
            write_reliability(folder / "calibration.csv", counts["calibration"].sum(0))


def _gather(
    names: list[str], counts: dict[str, list[torch.Tensor]], n_ranks: int
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Names and counts of all ranks, by name."""
    local = {kind: torch.cat(found).cpu().numpy() for kind, found in counts.items()}
    parts: list[Any] = [(names, local)]
    if n_ranks > 1:
        parts = [None] * n_ranks
        torch.distributed.all_gather_object(parts, (names, local))
    every = [name for part, _ in parts for name in part]
    order = sorted(range(len(every)), key=every.__getitem__)
    found = [part for _, part in parts if part]
    kinds = found[0] if found else {}
    gathered = {
        kind: torch.from_numpy(np.concatenate([part[kind] for part in found])[order])
        for kind in kinds
    }
    return [every[index] for index in order], gathered


def derive(counts: Mapping[str, torch.Tensor]) -> Arrays:
    """All figures from counts by kind, each with the same leading dimensions."""
    return {key: v for kind, found in counts.items() for key, v in _derive(kind, found).items()}


def _derive(kind: str, counts: torch.Tensor) -> Arrays:
    if kind == AREAS:
        return figures(counts)
    if kind == LOSS:
        return {"loss": (counts[..., 0].double() / counts[..., 1]).numpy()}
    return {key: values.numpy() for key, values in extra_figures(kind, counts).items()}


def _ends(counts: Mapping[str, torch.Tensor]) -> Arrays:
    """Ends of the interval of every figure; all kinds see the same draws of images."""
    found: Arrays = {}
    for kind in counts:
        found |= bootstrap(counts[kind], derive=partial(_derive, kind))
    return found


def write_images(path: Path, names: Sequence[str], counts: Mapping[str, torch.Tensor]) -> None:
    """Write one row per image: its labelled pixels, and the figures of it alone."""
    found = derive(counts)
    labelled = counts[AREAS][:, 1].sum(-1).tolist()
    averages = [key for key, values in found.items() if values.ndim == 1]
    rows = (
        [name, labelled[index], *(_cell(found[key][index]) for key in averages)]
        for index, name in enumerate(names)
    )
    _write(path, ["name", "labelled_pixels", *averages], rows)


def write_intervals(path: Path, values: Arrays, ends: Arrays, class_names: Sequence[str]) -> None:
    """Write each figure of the whole set with the ends of its 95 % interval over images."""
    averages = [key for key in values if values[key].ndim == 0]
    rows = [[key, "", *map(_cell, (values[key], *ends[key]))] for key in averages]
    for key in PER_CLASS:
        for index, name in enumerate(class_names if key in values else ()):
            cells = (values[key][index], *ends[key][:, index])
            rows.append([key, name, *map(_cell, cells)])
    _write(path, ["figure", "class", "value", "low", "high"], rows)


def write_reliability(path: Path, counts: torch.Tensor) -> None:
    """Write each bin of confidence: its pixels, how sure they were and how often right."""
    _, accuracy, confidence = (column.numpy() for column in reliability(counts))
    rows = [
        [f"{index / N_BINS:.6f}", f"{(index + 1) / N_BINS:.6f}", int(n), _cell(sure), _cell(right)]
        for index, (n, sure, right) in enumerate(
            zip(counts[0, :N_BINS].tolist(), confidence, accuracy, strict=True)
        )
    ]
    _write(path, ["above", "up_to", "pixels", "mean_confidence", "accuracy"], rows)


def write_confusion(folder: Path, confusion: NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Write the confusion matrix as counts, and as a picture; rows are labels."""
    rows = ([name, *row.tolist()] for name, row in zip(class_names, confusion, strict=True))
    _write(folder / "confusion.csv", ["label \\ prediction", *class_names], rows)
    save_picture(folder / "confusion.png", draw_confusion(confusion, class_names))


def draw_confusion(confusion: NDArray[np.int64], class_names: Sequence[str]) -> Pixels:
    """Draw each label's row by the part of its pixels that got each prediction, dark being all.

    A row that was never labelled is grey. Names and percentages stand where cells are wide enough.

    Args:
        confusion: Counts (K, K): rows are labels, columns are predictions.
        class_names: K names.

    Returns:
        uint8 RGB.
    """
    from PIL import Image, ImageDraw

    n_classes = len(class_names)
    side = max(1, min(_CELL * 2, _SIDE // n_classes))
    labelled = confusion.sum(1, keepdims=True)
    parts = np.where(labelled > 0, confusion / np.maximum(labelled, 1), np.nan)
    cells = _shades(parts).repeat(side, 0).repeat(side, 1)
    named = side >= 10
    margin = 8 + 7 * max(map(len, class_names)) if named else 0
    picture = Image.new("RGB", (margin + cells.shape[1], margin + cells.shape[0]), "white")
    picture.paste(Image.fromarray(cells), (margin, margin))
    if named:
        draw = ImageDraw.Draw(picture)
        for index, name in enumerate(class_names):
            middle = margin + index * side + side // 2
            draw.text((margin - 4, middle), name, "black", anchor="rm")
            _write_upright(picture, name, middle, margin)
        if side >= 2 * _CELL:
            _write_percentages(draw, parts, margin, side)
    return np.asarray(picture)


def _shades(parts: NDArray[np.float64]) -> Pixels:
    """White at 0 to dark blue at 1; grey for NaN."""
    strength = np.nan_to_num(parts)[..., None]
    white, blue = np.array([255.0, 255, 255]), np.array([8.0, 48, 107])
    shades = white + (blue - white) * strength
    shades[np.isnan(parts)] = 200
    found: Pixels = shades.round().astype(np.uint8)
    return found


def _write_upright(picture: Any, name: str, middle: int, margin: int) -> None:
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (margin, 12), "white")
    ImageDraw.Draw(strip).text((2, 6), name, "black", anchor="lm")
    picture.paste(strip.rotate(90, expand=True), (middle - 6, 0))


def _write_percentages(draw: Any, parts: NDArray[np.float64], margin: int, side: int) -> None:
    for row, column in np.argwhere(parts >= 0.0005):
        place = margin + column * side + side // 2, margin + row * side + side // 2
        color = "white" if parts[row, column] > 0.5 else "black"
        draw.text(place, f"{100 * parts[row, column]:.1f}", color, anchor="mm")


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6f}"


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
