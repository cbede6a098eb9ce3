"""The notes of a watched forward pass: calls of linear layers, sums, and what else was met."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .provenance import Concat, Origin, Part


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a linear layer: what the tracer hands to whoever listens.

    Attributes:
        key: Identity of the trained weight, negative for a computed weight.
        module: Name of the module that made the call.
        kind: "conv2d", "linear", ...
        weight: The weight as it was passed.
        groups: Groups of a convolution, else 1.
        values: Its input.
        layout: The concatenation along its input channels, or None for any other input.
        origin: What is known of its input.
        obstacle: Why the concatenation in its input cannot be equalized here; "" if nothing is
            in the way or there is none.
    """

    key: int
    module: str
    kind: str
    weight: Tensor
    groups: int
    values: Tensor
    layout: Concat | None
    origin: Origin
    obstacle: str = ""

    @property
    def is_fused(self) -> bool:
        """Whether several branches arrive."""
        return self.layout is not None and len(self.layout.runs) > 1

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each branch."""
        return tuple(width for _, width in self.layout.runs) if self.layout else ()

    def without_values(self) -> Call:
        """The call as a note that keeps no feature map alive."""
        if self.layout is None:
            return replace(self, origin=_UNKNOWN, values=_NOTHING)
        parts = tuple(replace(part, tensor=_NOTHING, joined=None) for part in self.layout.parts)
        layout = replace(self.layout, parts=parts)
        return replace(self, origin=self.origin.but(concat=None), values=_NOTHING, layout=layout)


_NOTHING, _UNKNOWN = torch.empty(0, device="cpu"), Origin()


@dataclass(frozen=True, eq=False)
class Sum:
    """An addition of maps made from different levels, and the module it happened in."""

    module: str


@dataclass(eq=False)
class Trace:
    """The raw notes of one or more forward passes.

    Attributes:
        calls: For each weight, the calls of its layer.
        norms: For each weight, the normalization that directly follows its layer.
        cancelled: The same, with homogeneous operations such as ReLU in between.
        sums: Fusions by addition.
        lost: Modules that take a concatenation where it is not followed, each with the reason.
        seen: Every concatenation met, as text.
        lone_norms: Batch normalizations that had one value per channel.
        levels: Numbers for the encoder's outputs and for resized maps.
    """

    calls: dict[int, list[Call]] = field(default_factory=dict)
    norms: dict[int, str] = field(default_factory=dict)
    cancelled: dict[int, str] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    lone_norms: int = 0
    levels: Iterator[int] = field(default_factory=itertools.count)

    def note_sum(self, module: str, summands: Sequence[Origin | Part]) -> None:
        """Keep an addition if it joins levels; a residual connection adds up one and the same."""
        if len({summand.levels for summand in summands}) > 1:
            self.sums.append(Sum(module))
