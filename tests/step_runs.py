"""Trainings of a few milliseconds a step, for tests about what happens after which step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from seglab.data import SegmentationDataModule
from seglab.data.sources.source import Shapes
from seglab.models.segmenter import Network
from seglab.optim import WarmupPolyLR
from seglab.task import SegmentationTask

K, SIDE = 3, 4


class Net(Network):
    """One convolution; batch normalization and dropout where asked for."""

    def __init__(self, norm: bool, dropout: float) -> None:
        super().__init__()
        self.num_classes = K
        self.main = nn.Conv2d(3, K, 1)
        self.norm = nn.BatchNorm2d(K) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def decode(self, image: Tensor) -> tuple[Tensor, ...]:
        return (self(image),)

    def forward(self, image: Tensor) -> Tensor:
        return self.dropout(self.norm(self.main(image.float() / 255)))


class Noise:
    """Image n is the noise of seed n."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return str(index)

    def shapes(self, index: int) -> Shapes:
        return Shapes((SIDE, SIDE), (SIDE, SIDE))

    def read(self, index: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return image, rng.integers(0, K, (SIDE, SIDE)).astype(np.uint8)


class NoiseData(SegmentationDataModule):
    def __init__(self, length: int = 22, **options: Any) -> None:
        super().__init__(["a", "b", "c"], **{"num_workers": 0, "batch_size": 2, **options})
        self.length = length

    def make_source(self, split: str) -> Noise:
        return Noise(self.length if split == "train" else 2)


class Diary(Callback):
    """Writes down the images of every step and when there was a validation."""

    def __init__(self) -> None:
        self.steps: dict[int, list[str]] = {}
        self.validations: list[int] = []
        self.inside: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, task: Any, batch: Any, index: int) -> None:
        self.steps.setdefault(trainer.global_step, []).extend(batch["name"])

    def on_validation_start(self, trainer: Trainer, task: Any) -> None:
        self.validations.append(trainer.global_step)
        if trainer.fit_loop.total_batch_idx % trainer.accumulate_grad_batches != (
            trainer.accumulate_grad_batches - 1
        ):
            self.inside.append(trainer.fit_loop.total_batch_idx)

    @property
    def images(self) -> list[list[str]]:
        return [sorted(names) for _, names in sorted(self.steps.items())]


def make_task(
    norm: bool = False, dropout: float = 0.0, total_steps: int | None = None, **options: Any
) -> SegmentationTask:
    torch.manual_seed(0)
    return SegmentationTask(
        Net(norm, dropout),
        K,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        scheduler=lambda o: WarmupPolyLR(o, total_steps=total_steps, eta_min=0.01),
        **options,
    )


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rest = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False}
    settings = {**quiet, **rest, "num_sanity_val_steps": 0, **options}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings)
