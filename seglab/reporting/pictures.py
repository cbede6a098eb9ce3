"""A picture of what the network sees at each validation: image | label | prediction."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from seglab.visualize import Pixels, as_rgb, color_table, grid, save_picture


class PictureGrid(Callback):
    """Saves a grid under `<log folder>/pictures` and hands it to the loggers.

    The rows are validation images of rank 0, spread over the set and the same at every validation.
    Colours come from the task's `palette`.

    Args:
        count: Rows of the grid; 0 saves nothing.
        side: Longest side of a cell in pixels.
    """

    def __init__(self, count: int = 4, side: int = 256) -> None:
        self.count = count
        self.side = side
        self.folder: Path | None = None  # where the last grid went
        self._rows: list[tuple[Pixels, Pixels, Pixels]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *_: Any,
    ) -> None:
        """Keep some images and what was made of them."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            n_batches = int(sum(trainer.num_val_batches))
            n_rows = -(-(batch_idx + 1) * self.count // n_batches)  # to have after this batch
            self._collect(batch, outputs["prediction"], n_rows)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the grid."""
        rows, self._rows = self._rows, []
        if not trainer.loggers or getattr(trainer, "fast_dev_run", False):
            return  # nowhere to keep it
        log_dir = trainer.log_dir  # a broadcast: every rank must ask
        if not rows or log_dir is None:
            return
        colors = color_table(pl_module.palette, pl_module.num_classes)  # type: ignore[arg-type]
        picture = grid(rows, colors, self.side)
        self.folder = Path(log_dir, "pictures")
        save_picture(self.folder / f"step_{trainer.global_step:07d}.png", picture)
        for logger in trainer.loggers:
            send_picture(logger, picture, trainer.global_step)

    def _collect(self, batch: Mapping[str, Any], prediction: Tensor, n_rows: int) -> None:
        for image, label, found in zip(batch["image"], batch["mask"], prediction, strict=True):
            if len(self._rows) >= n_rows:
                return
            self._rows.append((to_picture(image), to_mask(label), to_mask(found)))


def to_picture(image: Tensor) -> Pixels:
    """An image (C, H, W) in 0..255 on any device to uint8 RGB (H, W, 3)."""
    return as_rgb(image.permute(1, 2, 0).cpu().numpy())


def to_mask(ids: Tensor) -> Pixels:
    """Class ids (H, W) on any device to a uint8 array; ids above 255 end as 255."""
    return ids.clamp(max=255).cpu().numpy().astype(np.uint8)


def send_picture(logger: Any, picture: Pixels, step: int) -> None:
    """Hand a picture to a logger in the logger's own way; files have it already.

    Args:
        logger: TensorBoard, W&B, MLflow and Comet show pictures, others are passed over.
        picture: RGB (H, W, 3) uint8.
        step: Of the validation.
    """
    from lightning.pytorch.loggers import (
        CometLogger,
        MLFlowLogger,
        TensorBoardLogger,
        WandbLogger,
    )

    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("pictures", picture, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image("pictures", [picture], step)
    elif isinstance(logger, MLFlowLogger):
        file = f"pictures/step_{step:07d}.png"
        logger.experiment.log_image(logger.run_id, picture, artifact_file=file)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(picture, name="pictures", step=step)
