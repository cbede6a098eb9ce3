"""What a sum fusion is, and what its summands are to be multiplied by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scale_equalization.finding.observer import SumLocation


@dataclass(frozen=True)
class SumFusion:
    """An addition of maps of different levels: of two, or one after the other of more.

    Attributes:
        location: Where it happens, of several additions the first.
        sources: Modules that made the summands.
        producers: For each, the module that can be scaled in its stead; "" for none.
        weights: The edge weights the summands are multiplied by, if these can be scaled (`edges`).
    """

    location: SumLocation
    sources: tuple[str, ...]
    producers: tuple[str, ...]
    weights: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """No module has a name like it."""
        return f"sum {self.location[1]} in {self.location[0]}"

    @property
    def locations(self) -> tuple[SumLocation, ...]:
        """Of all its additions."""
        module, first = self.location
        return tuple((module, first + step) for step in range(len(self.sources) - 1))

    def summands_at(self, location: SumLocation) -> tuple[int | None, int]:
        """Which summands an addition takes; None for what the additions before have made."""
        step = location[1] - self.location[1]
        return (None if step else 0), step + 1


def balance(fusion: SumFusion, stds: Sequence[float]) -> tuple[float, ...]:
    """What each summand is multiplied by; 1 where that changes nothing or cannot be done.

    A summand that can be scaled is brought to the scale of the one that cannot; if both can, to
    their root mean square, so that the sum keeps its variance as if they were independent.
    """
    if fusion.weights:
        return balance_edges(fusion.weights, stds)
    fixed = [std for std, producer in zip(stds, fusion.producers, strict=True) if not producer]
    if len(fixed) == len(stds) or min(stds) <= 0.0:
        return (1.0,) * len(stds)
    target = fixed[0] if fixed else math.sqrt((stds[0] ** 2 + stds[1] ** 2) / 2)
    return tuple(
        target / std if producer else 1.0
        for std, producer in zip(stds, fusion.producers, strict=True)
    )


def balance_edges(weights: Sequence[float], stds: Sequence[float]) -> tuple[float, ...]:
    """What edge weights are multiplied by so that equal ones give summands of equal std.

    In sum_i w_i x_i / (sum_j w_j + eps), x_i of std s_i, the summand w_i x_i / (...) was measured:
    `stds` are in proportion to w_i s_i. The paper's W_i / s_i reads w_i <- c w_i / s_i here. With
    c = sum w / sum (w / s), the harmonic mean of the s_i weighted by w, the sum of the weights and
    with it the denominator stay as they are. Hence, eps included, every summand is multiplied by
    c / s_i exactly; its std is then c w_i / (sum w + eps), in proportion to its edge weight. Any
    other c would give the same up to eps, as the quotient cancels it.

    An edge that is cut off (w_i <= 0), and a constant map (std 0), are left as they are.

    >>> balance_edges((1.0, 1.0), (1.0, 3.0))
    (1.5, 0.5)
    """
    pairs = list(zip(weights, stds, strict=True))
    alive = [(w, std) for w, std in pairs if w > 0.0 and std > 0.0]
    if len(alive) < 2:
        return (1.0,) * len(pairs)
    mean = sum(w for w, _ in alive) / sum(w * w / std for w, std in alive)
    return tuple(mean * w / std if w > 0.0 and std > 0.0 else 1.0 for w, std in pairs)
