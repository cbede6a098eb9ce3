"""Divide one set of images into training and validation."""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from seglab.data.errors import DataError
from seglab.data.sources.files import Item


class Division(NamedTuple):
    """How one set of images is divided into training and validation: by a hash of their names.

    Names of one group never part. The hash depends on nothing else, so that adding images moves
    none, and every machine divides alike.

    Args:
        val_fraction: Share of the groups for validation.
        folds: Number of folds; with `fold`, instead of a share.
        fold: Which fold validates, from 0.
        group: Regular expression; what it (or its first group) matches in a name is the group.
    """

    val_fraction: float | None = None
    folds: int | None = None
    fold: int = 0
    group: str | None = None

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            ValueError: If a number is out of range, or a share is given as well as folds.
        """
        if self.val_fraction is not None and self.folds is not None:
            raise ValueError("data.val_fraction and data.folds both divide the images; give one")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction {self.val_fraction} must be between 0 and 1")
        if self.folds is not None and not (self.folds >= 2 and 0 <= self.fold < self.folds):
            raise ValueError(
                f"data.fold {self.fold} of {self.folds}: give folds >= 2, 0 <= fold < folds"
            )
        try:
            re.compile(self.group or "")
        except re.error as error:
            raise ValueError(
                f"data.group {self.group!r} is no regular expression: {error}"
            ) from error

    @property
    def is_given(self) -> bool:
        """Whether anything is to be divided."""
        return self.val_fraction is not None or self.folds is not None

    def choose(self, items: Sequence[Item], split: str) -> list[Item]:
        """Return the items of "train" or "val".

        Raises:
            DataError: If a split would be empty, or a name holds no group.
        """
        groups = {item.name: self._group(item) for item in items}
        chosen = {group for group in groups.values() if self._validates(group)}
        kept = [item for item in items if (groups[item.name] in chosen) == (split == "val")]
        if not kept:
            raise DataError(
                f"{len(set(groups.values()))} group(s) of images: {split} would be empty; change "
                "data.val_fraction, data.folds or data.group"
            )
        return kept

    def _validates(self, group: str) -> bool:
        number = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big")
        if self.folds is not None:
            return number % self.folds == self.fold
        return number / 2**64 < (self.val_fraction or 0)

    def _group(self, item: Item) -> str:
        if self.group is None:
            return item.name
        match = re.search(self.group, item.name)
        if match is None:
            raise DataError(f"data.group {self.group!r} matches nothing in the name {item.name!r}")
        return match[1] if match.re.groups else match[0]
