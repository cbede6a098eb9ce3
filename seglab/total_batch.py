"""The total batch of a recipe on any number of devices: gradients are accumulated to match it.

Numbers are reproduced by the total batch, not by the machine: 16 images a step are 8 devices x 2
images, or 1 device x 2 images x 8 accumulated batches. What accumulation cannot reproduce is said:
batch normalization sees the images of one forward pass only.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info


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
    """Set the trainer's accumulation, and its validation interval in batches, to fit `total`.

    Called before the training loader is set up.

    Args:
        trainer: With a data module that has a `batch_size`.
        total: Images of one optimizer step over all devices.

    Raises:
        ValueError: It cannot be matched, or the trainer asks for another accumulation.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    per_device = getattr(datamodule, "batch_size", None)
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
    if asked != needed:
        trainer.accumulate_grad_batches = needed
        if trainer.check_val_every_n_epoch is None and isinstance(trainer.val_check_interval, int):
            trainer.val_check_interval *= needed  # counts batches; the recipe counts steps
    rank_zero_info(
        f"total batch {total} = {trainer.world_size} devices x {per_device} images x {needed} "
        f"accumulated; batch normalization sees {_seen_by_norms(trainer, per_device)} images"
    )


def _seen_by_norms(trainer: Trainer, per_device: int) -> int:
    """Images that a batch normalization averages over: those of all devices if synchronized."""
    connector: Any = trainer._accelerator_connector
    synchronized = bool(getattr(connector, "sync_batchnorm", False))
    return per_device * (trainer.world_size if synchronized else 1)
