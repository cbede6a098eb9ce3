"""What every evaluation leaves: `ScoreFiles` of either split, counts per image, best and worst."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from seglab.metrics import ratios
from seglab.reporting.extremes import Extremes, merge, write_extremes
from seglab.reporting.file_names import COUNTS
from seglab.reporting.score_files import AREAS, ScoreFiles
from seglab.visualize import color_table


class EvaluationFiles(ScoreFiles):
    """Writes the files of `ScoreFiles` after every validation and test, and more.

    `counts.npz` has `names` (N,), `counts` (N, 3, K), see `seglab.image_scores.count_images`, and
    `class_names` (K,): with it, two runs can be compared image by image. `pictures/best_*.png`,
    `pictures/worst_*.png` and `extremes.json` show the images with the largest and smallest mIoU.

    Args:
        n_extremes: How many of the best, and of the worst; 0 draws none.
        side: Longest side of these pictures' cells in pixels.
    """

    def __init__(self, n_extremes: int = 4, side: int = 256) -> None:
        super().__init__()
        self.n_extremes = n_extremes
        self.side = side
        self._extremes = Extremes(n_extremes, side)

    def _begin(self, split: str) -> None:
        super()._begin(split)
        self._extremes = Extremes(self.n_extremes, self.side)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the images of a batch, on their device."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch)
        if self.n_extremes:
            scores = ratios(*self.counts[AREAS][-1].double().unbind(1))["mIoU"]
            images, labels, found = batch["image"], batch["mask"], outputs["prediction"]
            self._extremes.update(batch["name"], images, labels, found, scores)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files, on rank 0."""
        super().on_test_end(trainer, pl_module)
        log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: every rank must ask
        if not self.n_extremes or log_dir is None or getattr(trainer, "fast_dev_run", False):
            return
        found = [(self._extremes.best(), self._extremes.worst())]
        if trainer.world_size > 1:
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, found[0])
            found = everyone
        if trainer.is_global_zero:
            task: Any = pl_module
            colors = color_table(task.palette, task.num_classes)
            best, worst = merge(found, self.n_extremes)
            write_extremes(Path(log_dir), best, worst, colors, self.side)

    def _write(
        self, folder: Path, names: list[str], counts: dict[str, torch.Tensor], task: Any
    ) -> None:
        super()._write(folder, names, counts, task)
        np.savez_compressed(
            folder / COUNTS,
            names=np.array(names),
            counts=counts[AREAS].numpy(),
            class_names=np.array(task.class_names),
        )
