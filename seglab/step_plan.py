"""What happens after which optimizer step, for any number of devices and any accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class StepPlan:
    """Validations and the end of a training, as functions of the optimizer step alone.

    Args:
        steps_per_epoch: Optimizer steps of an epoch.
        last_step: Steps of the whole training; None if only time or a callback ends it.
        interval: Steps from validation to validation.
        every_n_epochs: Epochs with validations; in them `interval` begins anew. None: the interval
            counts through all epochs.

    >>> plan = StepPlan(steps_per_epoch=10, last_step=25, interval=4, every_n_epochs=None)
    >>> [step for step in range(1, 26) if plan.validates_after(step)]
    [4, 8, 12, 16, 20, 24, 25]
    >>> plan = StepPlan(steps_per_epoch=10, last_step=25, interval=4, every_n_epochs=2)
    >>> [step for step in range(1, 26) if plan.validates_after(step)]
    [14, 18, 25]
    """

    steps_per_epoch: int
    last_step: int | None
    interval: int
    every_n_epochs: int | None

    def validates_after(self, step: int) -> bool:
        """Whether there is a validation after so many steps."""
        if step == self.last_step:
            return True
        if self.every_n_epochs is None:
            return step % self.interval == 0
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        return (epoch + 1) % self.every_n_epochs == 0 and (position + 1) % self.interval == 0


def plan_steps(trainer: Trainer, steps_per_epoch: int) -> StepPlan:
    """Read a trainer's settings; its `val_check_interval` counts optimizer steps, not batches.

    Raises:
        ValueError: The interval is longer than the epoch it is to be in.
    """
    interval = getattr(trainer, "val_check_interval", None)  # absent where it is a time
    every = trainer.check_val_every_n_epoch
    if isinstance(interval, float):
        interval = max(1, int(steps_per_epoch * interval))
    elif not isinstance(interval, int):  # a time; `WholeSteps` asks Lightning's clock
        interval = steps_per_epoch
    if every is not None and interval > steps_per_epoch:
        raise ValueError(
            f"trainer.val_check_interval is {interval} steps, but an epoch has {steps_per_epoch}: "
            "set trainer.check_val_every_n_epoch to null to count through all epochs."
        )
    return StepPlan(steps_per_epoch, _last_step(trainer, steps_per_epoch), interval, every)


def _last_step(trainer: Trainer, steps_per_epoch: int) -> int | None:
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs not in (None, -1):
        ends.append(int(trainer.max_epochs) * steps_per_epoch)
    return min(ends, default=None)
