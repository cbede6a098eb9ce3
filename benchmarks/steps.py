"""What happens after which step in the 26 experiments, on 1, 2, 4 and 8 devices.

    python benchmarks/steps.py

Every training is counted through to its last batch with the real sampler, the real decisions of
Lightning's loop and of `WholeSteps` and the real checkpoint callbacks; only networks, images and
optimizers are left out. Where the stated images per device are too many for the devices, they are
lowered (`--data.batch_size`) as the total batch demands.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from seglab.cli.experiment import best_and_last
from seglab.data.sampler import EndlessSampler
from seglab.total_batch import count_limits_in_steps, match_total_batch
from seglab.whole_steps import WholeSteps

ROOT = Path(__file__).parents[1] / "configs"
N_IMAGES = {"ade20k": 20210, "voc_aug": 10582, "cityscapes": 2975}
DEVICES = (1, 2, 4, 8)


class Setup(NamedTuple):
    """What of a config decides about steps."""

    n_images: int
    batch_size: int
    total_batch: int
    max_steps: int
    interval: int


class Outcome(NamedTuple):
    """One line of the table."""

    layout: str
    steps: int
    least_images: int
    most_images: int
    validations: tuple[int, ...]
    last_checkpoint: int


def read_setup(path: Path) -> Setup:
    """Read a config of one of the three data sets."""
    config = yaml.safe_load(path.read_text())
    trainer = config["trainer"]
    assert trainer["max_epochs"] == -1
    assert trainer["check_val_every_n_epoch"] is None
    batch = config["data"]["init_args"]["batch_size"]
    sizes = (N_IMAGES[path.parent.name], batch, config["model"]["total_batch"])
    return Setup(*sizes, trainer["max_steps"], trainer["val_check_interval"])


class CountingTrainer(Trainer):
    """A trainer of so many devices that saves and measures nothing."""

    n_devices = 1
    saved_step = 0

    @property
    def world_size(self) -> int:
        """Devices of the simulated run."""
        return self.n_devices

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """Results that get better and better, so that each one is the best."""
        return {"val/mIoU": torch.tensor(self.global_step / 1e6)}

    @property
    def enable_validation(self) -> bool:
        """There is a validation set."""
        return True

    def save_checkpoint(self, *_: Any, **__: Any) -> None:
        """Note the step instead."""
        self.saved_step = self.global_step


@cache
def simulate(setup: Setup, n_devices: int, accumulate: int = 1) -> Outcome:
    """Count a training through.

    Args:
        setup: Of the config.
        n_devices: Devices it runs on.
        accumulate: `trainer.accumulate_grad_batches`, if the user gives it.
    """
    batch_size = min(setup.batch_size, setup.total_batch // n_devices)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trainer(setup, n_devices, accumulate, folder)
        trainer.datamodule = SimpleNamespace(batch_size=batch_size, seed=0)
        match_total_batch(trainer, setup.total_batch)
        count_limits_in_steps(trainer)
        window = trainer.accumulate_grad_batches
        sampler = EndlessSampler(setup.n_images, batch_size, 0, n_devices, 0, window)
        images, validations = _count_through(trainer, sampler)
    layout = f"{n_devices} x {batch_size} x {window}"
    steps = trainer.global_step
    return Outcome(layout, steps, min(images), max(images), tuple(validations), trainer.saved_step)


def _make_trainer(setup: Setup, n_devices: int, accumulate: int, folder: str) -> CountingTrainer:
    trainer = CountingTrainer(
        accelerator="cpu",
        devices=1,
        max_steps=setup.max_steps,
        max_epochs=-1,
        val_check_interval=setup.interval,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate,
        callbacks=[WholeSteps(), *best_and_last()],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.n_devices = n_devices
    trainer.state.fn, trainer.state.stage = TrainerFn.FITTING, RunningStage.TRAINING
    return trainer


def _count_through(trainer: CountingTrainer, sampler: EndlessSampler) -> tuple[set[int], list[int]]:
    """Images of the steps, and the steps with a validation."""
    loop, module = trainer.fit_loop.epoch_loop, LightningModule()
    whole_steps, *savers = trainer.callbacks
    for callback in trainer.callbacks:
        callback.setup(trainer, module, "fit")
    trainer.fit_loop.max_batches = len(sampler) // sampler.batch_size
    whole_steps.on_train_start(trainer, module)
    per_batch, images, seen, validations = sampler.batch_size * trainer.n_devices, 0, set(), []
    while not trainer.fit_loop.done:
        loop.batch_progress.reset_on_run()
        while not loop._is_training_done:
            images += per_batch
            _count_batch(loop)
            if not loop._should_accumulate():
                loop.automatic_optimization.optim_progress.optimizer.step.increment_completed()
                seen.add(images)
                images = 0
            if loop._should_check_val_fx(None):
                assert not images, "a validation inside the window of a step"
                validations.append(trainer.global_step)
                for saver in savers:
                    saver.on_validation_end(trainer, module)
        for saver in savers:
            saver.on_train_epoch_end(trainer, module)
        trainer.fit_loop.epoch_progress.current.processed += 1
    whole_steps.on_train_end(trainer, module)
    return seen | ({images} if images else set()), validations


def _count_batch(loop: Any) -> None:
    """What the loop counts during one batch."""
    for counts in (loop.batch_progress.total, loop.batch_progress.current):
        counts.ready += 1
        counts.started += 1
        counts.processed += 1
        counts.completed += 1
    loop.batch_progress.is_last_batch = (
        loop.batch_progress.current.ready == loop.trainer.num_training_batches
    )


def table(devices: tuple[int, ...] = DEVICES) -> list[str]:
    """Lines of the table, in Markdown."""
    lines = [
        "| config | devices x images x accumulated | steps | images of a step, least to most "
        "| validations | last checkpoint |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for path in sorted(path for name in N_IMAGES for path in (ROOT / name).glob("*.yaml")):
        for n_devices in devices:
            found = simulate(read_setup(path), n_devices)
            cells = (
                f"{path.parent.name}/{path.stem}",
                found.layout,
                f"{found.steps:,}",
                f"{found.least_images} to {found.most_images}",
                str(len(found.validations)),
                f"{found.last_checkpoint:,}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("\n".join(table()))
