"""Smallest and largest values of the numbers in a config, checked before and while it is built."""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple


class Bound(NamedTuple):
    """What a number may be.

    Attributes:
        least: The smallest value.
        most: The largest value.
        is_open: Whether the smallest value itself is not allowed.
    """

    least: float
    most: float = inf
    is_open: bool = False

    def describe(self) -> str:
        """In words, after "must be"."""
        words = f"{'above' if self.is_open else 'at least'} {self.least:.10g}"
        return words if self.most == inf else f"{words} and at most {self.most:.10g}"

    def holds(self, value: float) -> bool:
        """Whether a value is allowed; NaN is not."""
        return self.least <= value <= self.most and not (self.is_open and value == self.least)


_COUNT = Bound(1)

BOUNDS = {
    "data.batch_size": _COUNT,
    "data.eval_batch_size": _COUNT,
    "data.num_workers": Bound(0),
    "data.seed": Bound(0),
    "data.channels": _COUNT,
    "data.crop_size": _COUNT,
    "data.scale": _COUNT,
    "data.eval_scale": _COUNT,
    "data.repeat_rare": Bound(0, 1),
    "data.cache_gib": Bound(0),
    "data.size": Bound(32),  # smaller scenes cannot show their objects
    "data.train_length": _COUNT,
    "data.val_length": _COUNT,
    "data.limit": Bound(0, 1, is_open=True),
    "data.val_fraction": Bound(0, 1, is_open=True),
    "data.folds": Bound(2),
    "data.fold": Bound(0),
    "model.auxiliary_weight": Bound(0),
    "model.total_batch": _COUNT,
    "scale_equalization.tolerance": Bound(0),
    "scale_equalization.max_batches": _COUNT,
    "predictions.opacity": Bound(0, 1),
    "trainer.max_steps": Bound(-1),
    "trainer.max_epochs": Bound(-1),
    "seed_everything": Bound(0, 2**32 - 1),
}
"""By place; of a list of numbers each is meant."""


def check_bounds(**values: Any) -> None:
    """Refuse numbers that cannot be meant.

    Args:
        values: By place, with two underscores for its dot; None and texts are passed over.

    Raises:
        ValueError: With the place, the value and what it may be.

    >>> check_bounds(data__batch_size=0)
    Traceback (most recent call last):
    ValueError: data.batch_size is 0; it must be at least 1
    """
    for name, value in values.items():
        place = name.replace("__", ".")
        fault = find_fault(place, value)
        if fault:
            raise ValueError(fault)


def find_fault(place: str, value: Any) -> str:
    """What is wrong with the number, or the list of numbers, at a place; "" if nothing is."""
    if place not in BOUNDS:
        return ""
    bound = BOUNDS[place]
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    given = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)]
    if all(map(bound.holds, given)):
        return ""
    shown = numbers if isinstance(value, list | tuple) else value
    return f"{place} is {shown}; it must be {bound.describe()}"
