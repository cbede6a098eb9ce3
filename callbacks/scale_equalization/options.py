"""What an equalization is to do, checked before any batch is read. A leaf."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .patterns import DEFAULT_EXCLUDE

Mode = Literal["fold", "reparametrize", "off"]
MODES = ("fold", "reparametrize", "off")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `equalize_` and of the callback, which describe them.

    Raises:
        ValueError: What cannot be meant, with the cure.
    """

    mode: Mode = "fold"
    tolerance: float = 0.01
    max_batches: int | None = None
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = DEFAULT_EXCLUDE
    center: bool = False
    preserve_norm: bool = False
    placebo: bool = False
    sums: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, but must be one of {', '.join(MODES)}")
        if self.preserve_norm and self.placebo:
            raise ValueError("preserve_norm and placebo exclude each other: choose one")
        if self.center and self.placebo:
            raise ValueError("a placebo folds no means: leave out center")
        if self.sums and self.placebo:
            raise ValueError("a placebo of sums would equalize them: leave out sums")
        if self.sums and self.mode == "reparametrize":
            raise ValueError('sums=True scales whole layers once: use mode="fold"')
        if not self.tolerance >= 0.0:
            raise ValueError(f"tolerance is {self.tolerance}, but must be 0 or more")
        if self.max_batches is not None and self.max_batches < 1:
            raise ValueError(
                f"max_batches is {self.max_batches}, but must be at least 1, or None for all"
            )
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise ValueError(f"{name} is a text, but must be a sequence: ({patterns!r},)")
            object.__setattr__(self, name, tuple(patterns))
