"""A progress bar that does not hold up the GPU."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class ThriftyProgressBar(RichProgressBar):
    """Rich bar that reads the logged values only every `refresh_rate` batches.

    Lightning's own asks for them, and so waits for the GPU, at every single batch.

    Args:
        refresh_rate: Batches between two looks.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._shown: dict[str, Any] = {}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Values for the bar, at most `refresh_rate` batches old."""
        if not self._shown or not trainer.training or self._is_due(trainer):
            self._shown = super().get_metrics(trainer, pl_module)
            self._shown.pop("v_num", None)
        return self._shown

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.fit_loop.batch_idx % self.refresh_rate == 0
