"""How many optimizer steps a training will take, known before its first batch is loaded."""

import math

from lightning.pytorch import Trainer


def n_optimizer_steps(trainer: Trainer) -> int:
    """Count the optimizer steps of a whole `fit` from settings and the length of the data.

    Lightning's `estimated_stepping_batches` is not asked where a data module is at hand: it starts
    the loader's workers, and a loader with a position to restore on resume never gets it.

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
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        return int(trainer.estimated_stepping_batches)
    n_batches = _limited(len(datamodule.train_dataloader()), trainer)
    steps = max_epochs * math.ceil(n_batches / trainer.accumulate_grad_batches)
    return steps if max_steps < 0 else min(steps, max_steps)


def _limited(n_batches: int, trainer: Trainer) -> int:
    limit = trainer.limit_train_batches  # overfit_batches ends up here too
    return int(n_batches * limit) if isinstance(limit, float) else min(n_batches, limit)
