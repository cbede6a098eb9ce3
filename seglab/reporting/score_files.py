"""What `test` leaves beside its table: confusion matrix, scores per image, confidence intervals."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray

from seglab.image_scores import bootstrap, count_images, figures
from seglab.metrics import AVERAGES
from seglab.visualize import Pixels, save_picture

PER_CLASS = ("IoU", "Acc", "Precision", "Dice")
_CELL, _SIDE = 24, 1200  # largest side of a cell and usual side of the picture, pixels


class ScoreFiles(Callback):
    """Writes `images.csv`, `intervals.csv`, `confusion.csv` and `confusion.png` after `test`."""

    split = "test"  # of the task's metrics

    def __init__(self) -> None:
        self._names: list[str] = []
        self.counts: list[torch.Tensor] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        self._names, self.counts = [], []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the images of a batch, on their device."""
        n_classes: Any = pl_module.num_classes
        self.counts.append(count_images(outputs["prediction"], batch["mask"], n_classes))
        self._names += batch["name"]

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, on rank 0."""
        log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: every rank must ask
        names, counts = _gather(self._names, self.counts, trainer.world_size)
        self._names, self.counts = [], []
        task: Any = pl_module
        metrics = task.metrics[self.split]
        with metrics.sync_context():  # the sum over all ranks, which must all ask
            confusion = metrics.confusion.cpu().numpy()
        is_quiet = getattr(trainer, "fast_dev_run", False) or log_dir is None or not names
        if is_quiet or not trainer.is_global_zero:
            return
        folder = Path(str(log_dir))
        self._write(folder, names, counts, task)
        write_confusion(folder, confusion, task.class_names)

    def _write(self, folder: Path, names: list[str], counts: torch.Tensor, task: Any) -> None:
        write_images(folder / "images.csv", names, counts)
        if len(names) > 1:
            write_intervals(folder / "intervals.csv", counts, task.class_names)


def _gather(
    names: list[str], counts: list[torch.Tensor], n_ranks: int
) -> tuple[list[str], torch.Tensor]:
    """Names and counts of all ranks, by name."""
    local = torch.cat(counts).cpu().numpy() if counts else None
    parts: list[Any] = [(names, local)]
    if n_ranks > 1:
        parts = [None] * n_ranks
        torch.distributed.all_gather_object(parts, (names, local))
    every = [name for part, _ in parts for name in part]
    found = [part for _, part in parts if part is not None]
    if not found:
        return [], torch.zeros(0)
    order = sorted(range(len(every)), key=every.__getitem__)
    return [every[index] for index in order], torch.from_numpy(np.concatenate(found)[order])


def write_images(path: Path, names: Sequence[str], counts: torch.Tensor) -> None:
    """Write one row per image: its labelled pixels, and the figures of it alone."""
    found = figures(counts)
    labelled = counts[:, 1].sum(-1).tolist()
    rows = (
        [name, labelled[index], *(_cell(found[key][index]) for key in AVERAGES)]
        for index, name in enumerate(names)
    )
    _write(path, ["name", "labelled_pixels", *AVERAGES], rows)


def write_intervals(path: Path, counts: torch.Tensor, class_names: Sequence[str]) -> None:
    """Write each figure of the whole set with the ends of its 95 % interval over images."""
    values, ends = figures(counts.sum(0)), bootstrap(counts)
    rows = [[key, "", *map(_cell, (values[key], *ends[key]))] for key in AVERAGES]
    for key in PER_CLASS:
        for index, name in enumerate(class_names):
            cells = (values[key][index], *ends[key][:, index])
            rows.append([key, name, *map(_cell, cells)])
    _write(path, ["figure", "class", "value", "low", "high"], rows)


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
