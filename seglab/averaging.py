"""CheckpointAveraging: the equal mean of the weights at several steps, made on the way."""

from __future__ import annotations

from lightning.pytorch.callbacks import WeightAveraging

from seglab.lightning_internals import restart_average


class CheckpointAveraging(WeightAveraging):
    """Averages the weights after every n-th step, from a step on, all counting the same.

    Validation, `best.ckpt`, `last.ckpt` and the end of training have the average; until it begins
    they have the weights as they are. (Lightning's own averages validate the initial weights until
    theirs begin.) Buffers, such as batch statistics, are averaged too.

    Args:
        every_n_steps: Optimizer steps between two sets of weights.
        starting_at_step: The first one is taken after this step, counted from 1.
        device: Where the average is kept; that of the network at the start if None.

    Raises:
        ValueError: One of the numbers is below 1.
    """

    def __init__(
        self, every_n_steps: int, starting_at_step: int, device: str | None = None
    ) -> None:
        if min(every_n_steps, starting_at_step) < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps} and starting_at_step={starting_at_step}: both"
                " count optimizer steps from 1"
            )
        super().__init__(device=device)
        self.every_n_steps = every_n_steps
        self.starting_at_step = starting_at_step

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether these weights are taken; `step_idx` counts steps from 0."""
        if step_idx is None:
            return False
        n_since = step_idx + 1 - self.starting_at_step
        if n_since <= 0:
            restart_average(self)  # the next ones take the place of those before
            return True
        return n_since % self.every_n_steps == 0
