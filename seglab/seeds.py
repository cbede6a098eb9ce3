"""The one seed of a run, `--seed_everything`, and what is drawn from it."""

from __future__ import annotations

import os

import numpy as np
import torch

VARIABLE = "PL_GLOBAL_SEED"
"""Where Lightning's `seed_everything` leaves the seed, for other processes too."""


def global_seed() -> int | None:
    """Seed that `seed_everything` was given last; None if nobody called it."""
    value = os.environ.get(VARIABLE)
    return None if value is None else int(value)


def seed_of(*place: int) -> int:
    """Mix numbers into a seed: equal for equal numbers, unrelated for others.

    >>> seed_of(0, 1, 2) == seed_of(0, 1, 2), seed_of(0, 1, 2) == seed_of(0, 2, 1)
    (True, False)
    """
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed torch's draws on the CPU and on one device.

    `torch.manual_seed` seeds all devices and, where CUDA has not been started, spends milliseconds
    on noting down who asked.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
