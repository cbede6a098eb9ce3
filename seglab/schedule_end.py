"""The end of a learning-rate schedule when a training is resumed with another length."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.optim.lr_scheduler import LRScheduler

from seglab.optim import WarmupPolyLR


class ScheduleEnd(NamedTuple):
    """Where a schedule is to end, and whether the config says so.

    Attributes:
        total_steps: Steps of the schedule.
        is_given: The scheduler's own argument; else it is the length of the training.
    """

    total_steps: int
    is_given: bool


def settle_schedule_end(scheduler: LRScheduler, wanted: ScheduleEnd) -> None:
    """Compare with the end that a checkpoint brought along; stretch the schedule if asked to.

    Args:
        scheduler: After its state was restored, if it was.
        wanted: Of this run.

    Raises:
        ValueError: The ends differ and the config does not say which counts, or the scheduler
            cannot be stretched.
    """
    settings: Any = scheduler
    restored = settings.total_steps
    if restored == wanted.total_steps:
        return
    option = "--model.scheduler.init_args.total_steps"
    if not wanted.is_given:
        raise ValueError(
            f"the checkpoint's learning-rate schedule ends after {restored} steps, this training "
            f"after {wanted.total_steps}: {option} {restored} keeps the schedule (steps beyond it "
            f"train at its last rate), {option} {wanted.total_steps} stretches it."
        )
    if not isinstance(scheduler, WarmupPolyLR):
        raise ValueError(
            f"{type(scheduler).__name__} cannot be stretched from {restored} to "
            f"{wanted.total_steps} steps in a resumed training: {option} {restored} keeps it."
        )
    scheduler.set_end(wanted.total_steps)
