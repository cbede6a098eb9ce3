"""A progress bar that does not hold up the GPU."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar


class LowOverheadProgressBar(RichProgressBar):
    """Rich bar that reads the logged values only every `refresh_rate` batches.

    Lightning's own asks for them, and so waits for the GPU, at every single batch.

    Args:
        refresh_rate: Batches between two looks.
        training_values: Names of logged values to show. They are not to be logged with
            `prog_bar=True`: Lightning reads such values at every batch, whatever the bar.
    """

    def __init__(
        self, refresh_rate: int = 10, training_values: Sequence[str] = ("train/loss",)
    ) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.training_values = frozenset(training_values)
        self._shown: dict[str, Any] = {}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Values for the bar, at most `refresh_rate` batches old."""
        if not self._shown or not trainer.training or self._is_due(trainer):
            self._shown = super().get_metrics(trainer, pl_module)
            self._shown.pop("v_num", None)
            self._shown |= {
                name: value.item()
                for name, value in trainer.callback_metrics.items()
                if name in self.training_values
            }
        return self._shown

    def _get_train_description(self, current_epoch: int) -> str:
        endless = self.trainer.max_epochs in (None, -1)  # Lightning would write "Epoch 3/-2"
        return (
            f"Epoch {current_epoch}" if endless else super()._get_train_description(current_epoch)
        )

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.fit_loop.batch_idx % self.refresh_rate == 0
