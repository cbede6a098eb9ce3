"""Match module names to shell patterns; names without what wrappers add to them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase, translate

# A pretrained encoder is trained as it is: its own concatenations are no feature fusion.
DEFAULT_EXCLUDE = ("encoder.*", "*.encoder.*", "backbone.*", "*.backbone.*")

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def clean_name(name: str) -> str:
    """A module's name without what compiling, checkpointing and sharding add to it.

    >>> clean_name("decoder._orig_mod.fuse")
    'decoder.fuse'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


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
