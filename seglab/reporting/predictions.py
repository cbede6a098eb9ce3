"""Predictions as files: an indexed PNG and a colour overlay per image."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from seglab.bounds import check_bounds
from seglab.reporting.pictures import to_mask, to_picture
from seglab.visualize import color_table, overlay, save_mask, save_picture


class PredictionWriter(Callback):
    """Writes `masks/<name>.png` and `overlays/<name>.png` while `predict` runs, on any rank.

    Args:
        folder: Where to; `<log folder>` of the run if None.
        opacity: Of the colours over the image, 0..1.

    Raises:
        ValueError: If the opacity is something else.
    """

    def __init__(self, folder: str | None = None, opacity: float = 0.5) -> None:
        check_bounds(predictions__opacity=opacity)
        self.folder = folder
        self.opacity = opacity
        self._to = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the folder; all ranks write to that of rank 0."""
        log_dir = trainer.log_dir
        self._to = Path(self.folder or log_dir or "predictions")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Write one batch."""
        colors = color_table(pl_module.palette, pl_module.num_classes)  # type: ignore[arg-type]
        for name, image, ids in zip(batch["name"], batch["image"], outputs, strict=True):
            mask = to_mask(ids)
            save_mask(self._to / "masks" / f"{name}.png", mask, colors)
            mixed = overlay(to_picture(image), mask, colors, self.opacity)
            save_picture(self._to / "overlays" / f"{name}.png", mixed)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the files are."""
        if trainer.is_global_zero:
            print(f"masks     {self._to / 'masks'}\noverlays  {self._to / 'overlays'}")
