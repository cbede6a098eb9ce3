"""How many optimizer steps a training will take, known before its first batch is loaded."""

from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler


def n_optimizer_steps(trainer: Trainer) -> int:
    """Count the optimizer steps of a whole `fit` from settings and the length of the data.

    Lightning's `estimated_stepping_batches` is not asked where a data module deals its samples out
    itself: it starts the loader's workers, and a loader with a position to restore on resume never
    gets it.

    Args:
        trainer: Attached to a data module whose `setup("fit")` has run.

    Returns:
        Optimizer steps, accumulated batches counted as one.

    Raises:
        ValueError: The training has no end.
    """
    max_epochs, max_steps = trainer.max_epochs, trainer.max_steps
    if max_steps >= 0 and max_epochs in (None, -1):
        return max_steps
    if max_epochs in (None, -1):
        raise ValueError(
            "the schedule needs an end, but training has none: set trainer.max_steps or"
            " trainer.max_epochs, or the schedule's total_steps."
        )
    steps = max_epochs * (_n_batches(trainer) // trainer.accumulate_grad_batches)
    return steps if max_steps < 0 else min(steps, max_steps)


def _n_batches(trainer: Trainer) -> int:
    """Batches of an epoch on one device."""
    datamodule = getattr(trainer, "datamodule", None)
    loader: Any = None if datamodule is None else datamodule.train_dataloader()
    # Lightning would deal any other sampler out to several devices, and so shorten the epoch.
    settled = trainer.world_size == 1 or isinstance(
        getattr(loader, "sampler", None), DistributedSampler
    )
    if hasattr(loader, "__len__") and settled:
        return _limited(len(loader), trainer)
    if trainer.estimated_stepping_batches == float("inf"):  # sets the loader up
        raise ValueError(
            "the length of an epoch is unknown, so trainer.max_epochs ends no schedule: set"
            " trainer.limit_train_batches or trainer.max_steps."
        )
    return int(trainer.num_training_batches)


def _limited(n_batches: int, trainer: Trainer) -> int:
    limit = trainer.limit_train_batches  # overfit_batches ends up here too
    return int(n_batches * limit) if isinstance(limit, float) else min(n_batches, limit)
