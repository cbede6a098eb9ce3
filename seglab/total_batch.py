"""The total batch of a recipe on any number of devices: gradients are accumulated to match it.

Numbers are reproduced by the total batch, not by the machine: 16 images a step are 8 devices x 2
images, or 1 device x 2 images x 8 accumulated batches. What accumulation cannot reproduce is said:
batch normalization sees the images of one forward pass only.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info

from seglab.lightning_internals import synchronizes_batch_norm


def n_accumulated(total: int, per_device: int, n_devices: int) -> int:
    """Batches to accumulate so that a step sees `total` images.

    Raises:
        ValueError: No number of batches gives just that total.

    >>> n_accumulated(16, per_device=2, n_devices=4)
    2
    """
    per_pass = per_device * n_devices
    if per_pass < 1 or total % per_pass:
        raise ValueError(
            f"model.total_batch is {total}, but {n_devices} devices x data.batch_size {per_device} "
            f"= {per_pass} images a pass do not divide it: change trainer.devices or "
            "data.batch_size, or set model.total_batch to another number if you mean another "
            "experiment."
        )
    return total // per_pass


def match_total_batch(trainer: Trainer, total: int) -> None:
    """Set the trainer's accumulation to fit `total`.

    Called before the training loader is set up.

    Args:
        trainer: With a data module that has a `batch_size`.
        total: Images of one optimizer step over all devices.

    Raises:
        ValueError: It cannot be matched, or the trainer asks for another accumulation.
    """
    per_device = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if per_device is None:
        raise ValueError(
            "model.total_batch needs a data module with a batch_size: pass one to fit, or leave "
            "total_batch out and set trainer.accumulate_grad_batches yourself."
        )
    needed = n_accumulated(total, per_device, trainer.world_size)
    asked = trainer.accumulate_grad_batches
    if asked not in (1, needed):
        raise ValueError(
            f"trainer.accumulate_grad_batches is {asked}, but model.total_batch {total} needs "
            f"{needed} with {trainer.world_size} devices x {per_device} images: leave it out."
        )
    trainer.accumulate_grad_batches = needed
    rank_zero_info(
        f"total batch {total} = {trainer.world_size} devices x {per_device} images x {needed} "
        f"accumulated; batch normalization sees {_seen_by_norms(trainer, per_device)} images"
    )


def count_limits_in_steps(trainer: Trainer) -> None:
    """Let `limit_train_batches`, `overfit_batches` and `fast_dev_run` count optimizer steps.

    Lightning counts batches by them; a number that means the same on any number of devices counts
    steps. Called when the accumulation is settled and before the training loader is set up; again,
    it changes nothing.

    Raises:
        ValueError: The accumulation is to change during training.
    """
    if any(isinstance(c, GradientAccumulationScheduler) for c in _callbacks(trainer)):
        raise ValueError(
            "GradientAccumulationScheduler changes the images of a step while the schedule and the "
            "order of the images count on them: leave it out and set model.total_batch or "
            "trainer.accumulate_grad_batches."
        )
    limit: Any = trainer.limit_train_batches
    asked, changed = _LIMITS.get(trainer, (None, None))
    if changed is not None and limit == changed:
        limit = asked
    if isinstance(limit, int):
        trainer.limit_train_batches = limit * trainer.accumulate_grad_batches
        _LIMITS[trainer] = (limit, trainer.limit_train_batches)


_LIMITS: WeakKeyDictionary[Trainer, tuple[int, int]] = WeakKeyDictionary()
"""Limits in steps as asked for, and what they became: a trainer may fit twice."""


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(getattr(trainer, "callbacks", []))


def _seen_by_norms(trainer: Trainer, per_device: int) -> int:
    """Images that a batch normalization averages over: those of all devices if synchronized."""
    return per_device * (trainer.world_size if synchronizes_batch_norm(trainer) else 1)
