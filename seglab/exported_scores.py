"""What an exported file scores and how long it takes, beside the network it was made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from seglab.export import ExportError
from seglab.exported import load_exported
from seglab.metrics import SegmentationMetrics
from seglab.task import SegmentationTask

MIOU_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Scores:
    """Of the network and of the file, on the same images one by one.

    Attributes:
        n_images: How many.
        network_miou: Mean IoU of the network, 0..1.
        file_miou: Mean IoU of the file, 0..1.
        gain: Seconds of the network over those of the file.
    """

    n_images: int
    network_miou: float
    file_miou: float
    gain: float

    @property
    def loss(self) -> float:
        """By how much the file's mIoU is lower."""
        return self.network_miou - self.file_miou

    def __str__(self) -> str:
        return (
            f"mIoU on {self.n_images} validation images {100 * self.file_miou:.2f}, the network's"
            f" {100 * self.network_miou:.2f} (loses {100 * self.loss:.2f}),"
            f" {self.gain:.2f} times as fast as the network"
        )

    def to_dict(self) -> dict[str, Any]:
        """For the metadata."""
        return {"scores": {**asdict(self), "loss": self.loss}}


def score_file(
    task: SegmentationTask,
    path: Path,
    dataset: Dataset[Any],
    progress: Callable[[str, int, int], None],
) -> Scores:
    """Evaluate a network and an exported file of it by the same rule.

    Args:
        task: The network and its rule, on the CPU.
        path: The file.
        dataset: Labelled images as evaluation shows them.
        progress: Called with "check", the finished and all images.

    Raises:
        ExportError: The file takes no images of these sizes, or there are none.
    """
    items: Any = dataset
    if not len(items):
        raise ExportError("the validation set is empty: there is nothing to check on")
    others = {"network": task.eval(), "file": load_exported(path, None)[0]}
    ignore_index: Any = task.metrics["val"].ignore_index
    metrics = {name: SegmentationMetrics(task.num_classes, ignore_index) for name in others}
    seconds = dict.fromkeys(others, 0.0)
    for index in range(len(items)):
        item = items[index]
        batch = {"image": item["image"][None], "mask": item["mask"][None]}
        for name, each in others.items():
            start = time.perf_counter()
            ids = _predict(each, batch, path)
            seconds[name] += (time.perf_counter() - start) if index or len(items) == 1 else 0.0
            metrics[name].update(ids, batch["mask"].long())
        progress("check", index + 1, len(items))
    mious = {name: float(metric.compute()["mIoU"]) for name, metric in metrics.items()}
    gain = seconds["network"] / seconds["file"]
    return Scores(len(items), mious["network"], mious["file"], gain)


@torch.inference_mode()
def _predict(task: SegmentationTask, batch: dict[str, Any], path: Path) -> torch.Tensor:
    try:
        return task.predict_step(batch, 0)
    except ValueError as error:
        raise ExportError(f"{path.name} cannot be checked on the data: {error}") from error


def refuse_loss(scores: Scores, path: Path) -> None:
    """Raise ExportError if the mIoU of a file of floats is not the network's."""
    if not abs(scores.loss) <= MIOU_TOLERANCE:
        raise ExportError(
            f"{path} is not written: its mIoU on {scores.n_images} validation images is"
            f" {scores.file_miou:.5f} and the network's {scores.network_miou:.5f}, allowed is a"
            f" difference of {MIOU_TOLERANCE:.0e}"
        )
