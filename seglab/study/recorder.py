"""RunRecorder: what one run of a study is asked for while it trains; changes nothing in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from seglab.schedule_length import n_optimizer_steps
from seglab.study.plan import DATA, LABELS, WEIGHTS

N_MEASUREMENTS = 10  # of the branches in a run, unless the plan says otherwise


class RunRecorder(Callback):
    """Keeps curve, scores and digests of a run; must stand before every other callback.

    Args:
        settle_monitor: Let `ScaleMonitor` measure about ten times.

    Attributes:
        pairing: Digests of the weights that the network began with, before anything equalized
            them, of all batches that it was trained on, in their order, and of the masks of the
            last validation.
        curve: (step, mIoU) of every validation.
        per_class: IoU of each class in the last validation; None if absent.
        diverged: The first parameter that is not finite after the training; empty if all are.
    """

    def __init__(self, settle_monitor: bool = False) -> None:
        self.settle_monitor = settle_monitor
        self.curve: list[tuple[int, float]] = []
        self.per_class: dict[str, float | None] = {}
        self.diverged = ""
        self._weights = ""
        self._batches = hashlib.sha256()
        self._masks = hashlib.sha256()

    @property
    def pairing(self) -> dict[str, str]:
        """Digests by what they are of."""
        return {
            WEIGHTS: self._weights,
            DATA: self._batches.hexdigest(),
            LABELS: self._masks.hexdigest(),
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the initial weights."""
        network: Any = pl_module.network
        self._weights = digest(network.state_dict())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Spread the monitor's measurements over the run."""
        if self.settle_monitor:
            interval = max(1, -(-n_optimizer_steps(trainer) // N_MEASUREMENTS))
            callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
            for callback in callbacks:
                if type(callback).__name__ == "ScaleMonitor":
                    callback.every_n_steps = interval

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch."""
        for values in (batch["image"], batch["mask"]):
            self._batches.update(_bytes_of(values))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the masks of the validation before."""
        self._masks = hashlib.sha256()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the masks one by one, since arms may validate in batches of other sizes."""
        for mask in batch["mask"]:
            self._masks.update(_bytes_of(mask))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the scores."""
        if trainer.sanity_checking:
            return
        task: Any = pl_module
        results = task.metrics["val"].compute()
        self.curve.append((trainer.global_step, float(results["mIoU"])))
        ious = zip(task.class_names, results["IoU"].tolist(), strict=True)
        self.per_class = {name: iou if iou == iou else None for name, iou in ious}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether anything was learned: NaN has an argmax too, hence an mIoU."""
        network: Any = pl_module.network
        lost = (name for name, w in network.named_parameters() if not w.isfinite().all())
        self.diverged = next(lost, "")


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values.

    >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(1, 2)})
    False
    """
    found = hashlib.sha256()
    for name, values in state.items():
        found.update(f"{name} ".encode())
        found.update(_bytes_of(values))
    return found.hexdigest()


def _bytes_of(values: Tensor) -> bytes:
    head = f"{values.dtype} {tuple(values.shape)} ".encode()
    flat = values.detach().cpu().contiguous().flatten()
    return head + flat.view(torch.uint8).numpy().tobytes()
