"""What a sum fusion is, and what its summands are to be multiplied by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scale_equalization.finding.observer import SumLocation


@dataclass(frozen=True)
class SumFusion:
    """An addition of two maps of different levels.

    Attributes:
        location: Where it happens.
        sources: Modules that made the summands.
        producers: For each, the module that can be scaled in its stead; "" for none.
    """

    location: SumLocation
    sources: tuple[str, str]
    producers: tuple[str, str]

    @property
    def name(self) -> str:
        """No module has a name like it."""
        return f"sum {self.location[1]} in {self.location[0]}"


def balance(fusion: SumFusion, stds: Sequence[float]) -> tuple[float, float]:
    """What each summand is multiplied by.

    A summand that can be scaled is brought to the scale of the one that cannot; if both can, to
    their root mean square, so that the sum keeps its variance as if they were independent.
    """
    fixed = [std for std, producer in zip(stds, fusion.producers, strict=True) if not producer]
    if len(fixed) == 2 or min(stds) <= 0.0:
        return 1.0, 1.0
    target = fixed[0] if fixed else math.sqrt((stds[0] ** 2 + stds[1] ** 2) / 2)
    first, second = (
        target / std if producer else 1.0
        for std, producer in zip(stds, fusion.producers, strict=True)
    )
    return first, second
