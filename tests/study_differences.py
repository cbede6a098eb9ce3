"""Callbacks by which tests plant a difference between arms that no override tells of."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback


class OtherWeights(Callback):
    """Changes one initial weight by the smallest step."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        weight = next(pl_module.network.parameters())
        with torch.no_grad():
            weight.flatten()[0] = torch.nextafter(weight.flatten()[0], torch.tensor(9.0))


class OtherOrder(Callback):
    """Draws the training samples in another order."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        trainer.datamodule.seed += 1


class OtherLabel(Callback):
    """Changes one pixel of one training mask."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        source = trainer.datamodule.train_dataset
        read = type(source).__getitem__

        class Changed(type(source)):
            def __getitem__(self, index: Any) -> Any:
                item = read(self, index)
                item["mask"].flatten()[0] ^= 1
                return item

        source.__class__ = Changed


class OtherValidation(Callback):
    """Validates without the last image."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        source = trainer.datamodule.val_dataset

        class Shorter(type(source)):
            def __len__(self) -> int:
                return super().__len__() - 1

        source.__class__ = Shorter


class Breaks(Callback):
    """Fails, as the data of a run may, until it is told not to."""

    broken = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.broken:
            raise ValueError("out of luck\nand more lines")


class KillsItsProcess(Callback):
    """Ends as what takes more memory than there is."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class IsToldToStop(Callback):
    """Gets the signal that clusters send."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
