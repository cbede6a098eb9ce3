"""Which modules are meant: shell patterns over full names. A leaf."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase, translate

# A pretrained encoder is trained as it is: its own concatenations are no feature fusion.
DEFAULT_EXCLUDE = ("encoder.*", "*.encoder.*", "backbone.*", "*.backbone.*")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the shell patterns fits the name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def within(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that fit, or all of whose submodules do.

    >>> sorted(within(["encoder", "encoder.conv", "encoders"], ["encoder.*"]))
    ['encoder', 'encoder.conv']
    """
    fits = re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")
    return {name for name in names if fits.match(name) or fits.match(name + ".")}
