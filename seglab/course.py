"""What a checkpoint must agree on with the run that continues it, and its place in the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from seglab.lightning_internals import BATCH_PROGRESS, FIT_LOOP, VALIDATION_PROGRESS


class Course(NamedTuple):
    """What fixes the images of every step, and how many batches a step has on one device.

    Attributes:
        total_batch: Images of a step; None if the data module does not say.
        data_seed: Seed of their order; None if the data module has none.
        n_accumulated: Batches of a step; a run may continue with another number.
    """

    total_batch: int | None
    data_seed: int | None
    n_accumulated: int

    @classmethod
    def of(cls, trainer: Trainer) -> Course:
        """Read a trainer whose accumulation is settled."""
        data = getattr(trainer, "datamodule", None)
        per_device, seed = getattr(data, "batch_size", None), getattr(data, "seed", None)
        window = trainer.accumulate_grad_batches
        total = None if per_device is None else per_device * trainer.world_size * window
        return cls(total, seed, window)


def continue_course(course: Course, saved: Mapping[str, Any], loops: dict[str, Any]) -> None:
    """Set a checkpoint's counters of batches to this run's number of devices.

    Args:
        course: Of the run that continues.
        saved: Of the run that wrote the checkpoint.
        loops: The checkpoint's `loops`, changed in place.

    Raises:
        ValueError: The images of the steps would be others.
    """
    for key, name in (("total_batch", "images a step"), ("data_seed", "as seed of the data")):
        ours, theirs = getattr(course, key), saved[key]
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"the checkpoint was trained with {theirs} {name}, this run has {ours}: set "
                f"{CURES[key].format(theirs)} to continue it, or give the file to --model.weights "
                "to begin a new training from its weights."
            )
    if course.n_accumulated != saved["n_accumulated"]:
        for counts in _counters(loops):
            behind = counts["processed"] - counts["completed"]  # 1 if written as a batch ended
            done = counts["processed"] // saved["n_accumulated"] * course.n_accumulated
            counts |= dict.fromkeys(("ready", "started", "processed"), done)
            counts["completed"] = done - behind


CURES = {
    "total_batch": "--model.total_batch {}",
    "data_seed": "--seed_everything {0} (or --data.seed {0}, if it was set)",
}


def rewind(loops: dict[str, Any], n_accumulated: int) -> None:
    """Set a checkpoint's counters of batches back to the last whole step.

    Args:
        loops: The checkpoint's `loops`, changed in place.
        n_accumulated: Batches of a step.

    >>> counts = {"ready": 7, "started": 7, "processed": 6, "completed": 6}
    >>> loops = {FIT_LOOP: {BATCH_PROGRESS: {"total": dict(counts), "current": counts}}}
    >>> rewind(loops, n_accumulated=4)
    >>> counts
    {'ready': 4, 'started': 4, 'processed': 4, 'completed': 4}
    """
    total, current = _counters(loops)
    since_border = current["processed"] % n_accumulated
    for counts in (total, current):
        counts |= dict.fromkeys(counts, counts["processed"] - since_border)
    loops[FIT_LOOP][BATCH_PROGRESS]["is_last_batch"] = False


def settle_epoch(loops: dict[str, Any], n_batches: float) -> bool:
    """Make a checkpoint written between two epochs say so.

    Lightning leaves its counters of batches at the last epoch's end, and goes on from there with a
    batch too many if only `max_steps` ends the training; and it counts the epoch in which
    `max_steps` came as a whole one, which a longer training then never finishes.

    Args:
        loops: The checkpoint's `loops`, changed in place.
        n_batches: Batches of an epoch on this device.

    Returns:
        Whether it was.
    """
    epochs = loops[FIT_LOOP]["epoch_progress"]
    total, current = _counters(loops)
    if not current["processed"] or epochs["current"]["started"] != epochs["current"]["processed"]:
        return False
    is_whole = current["processed"] == n_batches
    for counts in epochs.values():
        done = counts["processed"] - (not is_whole)
        counts |= {"ready": done + 1, "started": done + (not is_whole)}
        counts |= {"processed": done, "completed": done}
    for counts in (total, current):
        counts |= dict.fromkeys(counts, counts["processed"])
    if is_whole:
        current |= dict.fromkeys(current, 0)
    loops[FIT_LOOP][BATCH_PROGRESS]["is_last_batch"] = False
    return True


def repeat_validation(loops: dict[str, Any]) -> None:
    """Make a checkpoint written inside a validation begin it anew.

    Lightning finishes a validation of which one batch was begun; none was counted then.

    Args:
        loops: The checkpoint's `loops`, changed in place.
    """
    progress = loops[FIT_LOOP][VALIDATION_PROGRESS]
    progress["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["current"] |= dict.fromkeys(progress["current"], 0)
    progress["is_last_batch"] = False


def _counters(loops: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    progress = loops[FIT_LOOP][BATCH_PROGRESS]
    return progress["total"], progress["current"]
