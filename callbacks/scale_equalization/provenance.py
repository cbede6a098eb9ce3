"""Where a tensor comes from: the few facts about it that decide whether a fusion can be folded.

Values only. `tracer` watches the forward pass, `propagation` says what an operation does to them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """A slice of a tensor just before its concatenation: the branch as the method measures it.

    Attributes:
        tensor: What was concatenated.
        dim: The dimension the slice is taken along.
        start: First index of the slice.
        width: Its length.
        version: The tensor's version then; in-place operations raise it.
        upsampling: Ratio of heights gained by resizing.
        interpolation: Mode of the last resizing.
        source: Module that made it.
        levels: Levels it was made from, see `Origin`.
        joined: The concatenation, its version, and the slice's start in it, once known.
    """

    tensor: Tensor
    dim: int
    start: int
    width: int
    version: int
    upsampling: float
    interpolation: str | None
    source: str
    levels: frozenset[int]
    joined: tuple[weakref.ref[Tensor], int, int] | None = None

    def values(self) -> Tensor | None:
        """The branch's values, or None if they were overwritten after the concatenation."""
        if version(self.tensor) == self.version:
            return self.tensor.narrow(self.dim, self.start, self.width)
        joined = self.joined and self.joined[0]()
        if self.joined is None or joined is None or version(joined) != self.joined[1]:
            return None
        return joined.narrow(self.dim, self.joined[2], self.width)


@dataclass(frozen=True, eq=False)
class Concat:
    """The layout of a concatenation: along `dim`, runs of (index into parts, channels).

    Attributes:
        dim: The one dimension along which the parts follow each other; -1 if there is none.
        runs: The parts in order along `dim`; empty if there is none.
        parts: What was concatenated.
        labels: Only without such a dimension: 1 + the part's index at every element, with
            length 1 along every dimension that does not matter.
    """

    dim: int
    runs: tuple[tuple[int, int], ...]
    parts: tuple[Part, ...]
    labels: Tensor | None = None

    def channels(self) -> int:
        """Number of channels along `dim`."""
        return sum(width for _, width in self.runs)


NO_LEVELS: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Origin:
    """What is known of one tensor.

    Attributes:
        source: Module that made it; "" for the network's input.
        upsampling: Ratio of heights gained by resizing since then.
        interpolation: Mode of the last resizing since then.
        concat: Its layout, if it is (still) a concatenation.
        blocked: Why the concatenation's scales no longer reach a consumer unchanged; without a
            layout, why one was lost.
        version: The tensor's version when `concat` was noted.
        upstream: Keys of consumers of concatenations whose output reaches it.
        consumer: Key of the consumer whose output it is, up to homogeneous operations.
        bent: Whether one of these was not linear.
        constant: Whether it depends on parameters and constants only.
        levels: The encoder's outputs and the resized maps it was made from, numbered.
        writes: How often a tensor was written into a slice of it.
        in_encoder: Whether it was made in a module that is left alone.
    """

    source: str = ""
    upsampling: float = 1.0
    interpolation: str | None = None
    concat: Concat | None = None
    blocked: str | None = None
    version: int = -1
    upstream: frozenset[int] = frozenset()
    consumer: int | None = None
    bent: bool = False
    constant: bool = False
    levels: frozenset[int] = NO_LEVELS
    writes: int = 0
    in_encoder: bool = False

    def but(self, **changes: Any) -> Origin:
        """A changed copy: `dataclasses.replace`, four times as fast, once for each operation."""
        other = object.__new__(Origin)
        other.__dict__.update(self.__dict__)
        other.__dict__.update(changes)
        return other


def version(tensor: Tensor) -> int:
    """How often the tensor's memory was written to; -1 where PyTorch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def concatenate(
    tensors: Sequence[Tensor], origins: Sequence[Origin], dim: int, result: Tensor
) -> Concat:
    """Layout of ``torch.cat(tensors, dim)``: nested concatenations become their atomic branches."""
    if any(_runs_across(origin, dim) for origin in origins):
        return _crossed(tensors, origins, dim)
    parts: list[Part] = []
    runs: list[tuple[int, int]] = []
    joined, offset = (weakref.ref(result), version(result)), 0
    for tensor, origin in zip(tensors, origins, strict=True):
        start = 0
        for facts, width in _pieces(tensor, origin, dim):
            runs.append((len(parts), width))
            place = (*joined, offset + start)
            parts.append(_part(tensor, dim, start, width, facts, place))
            start += width
        offset += tensor.shape[dim]
    return Concat(dim, tuple(runs), tuple(parts))


def _pieces(tensor: Tensor, origin: Origin, dim: int) -> list[tuple[Origin | Part, int]]:
    """What one operand adds to a concatenation: itself, or the branches it is made of."""
    layout = origin.concat
    if layout is None or layout.dim != dim or origin.blocked:
        return [(origin, tensor.shape[dim])]
    return [(layout.parts[index], width) for index, width in layout.runs]


def _runs_across(origin: Origin, dim: int) -> bool:
    return origin.concat is not None and not origin.blocked and origin.concat.dim != dim


def _crossed(tensors: Sequence[Tensor], origins: Sequence[Origin], dim: int) -> Concat:
    """Layout of a concatenation of concatenations along another dimension, e.g. over the batch."""
    parts: list[Part] = []
    maps: list[Tensor] = []
    for tensor, origin in zip(tensors, origins, strict=True):
        layout = origin.concat if origin.concat is not None and not origin.blocked else None
        inner = layout or Concat(-1, (), (), torch.ones([1] * tensor.dim(), device="cpu"))
        maps.append(_labels(inner, tensor.dim()) + len(parts))
        parts += layout.parts if layout else (_part(tensor, dim, 0, tensor.shape[dim], origin),)
    shape = [max(lengths) for lengths in zip(*(labels.shape for labels in maps), strict=True)]
    wide = [
        labels.expand(*shape[:dim], tensor.shape[dim], *shape[dim + 1 :])
        for labels, tensor in zip(maps, tensors, strict=True)
    ]
    labels = compact(torch.cat(wide, dim))
    return _read_layout(tuple(parts), labels) or Concat(-1, (), tuple(parts), labels)


def stack(tensors: Sequence[Tensor], origins: Sequence[Origin], dim: int) -> Concat:
    """Layout of ``torch.stack(tensors, dim)``: one run of width 1 for each tensor."""
    parts = tuple(
        _part(tensor, 0, 0, tensor.shape[0], origin)
        for tensor, origin in zip(tensors, origins, strict=True)
    )
    return Concat(dim, tuple((index, 1) for index in range(len(parts))), parts)


def _part(
    tensor: Tensor,
    dim: int,
    start: int,
    width: int,
    facts: Origin | Part,
    joined: tuple[weakref.ref[Tensor], int, int] | None = None,
) -> Part:
    return Part(
        tensor,
        dim,
        start,
        width,
        version(tensor),
        facts.upsampling,
        facts.interpolation,
        facts.source,
        facts.levels,
        joined,
    )


def resized(origin: Origin, ratio: float, mode: str) -> Origin:
    """The origin after resizing by `ratio`: the branches of a concatenation are resized too."""
    layout = origin.concat
    if layout is not None:
        parts = tuple(
            replace(part, upsampling=part.upsampling * ratio, interpolation=mode)
            for part in layout.parts
        )
        layout = replace(layout, parts=parts)
    ratio *= origin.upsampling
    return origin.but(upsampling=ratio, interpolation=mode, concat=layout)


def rearranged(
    layout: Concat, shape: Sequence[int], move: Callable[[Tensor], Any]
) -> tuple[Concat | None, ...]:
    """Layouts after a structural operation, found by moving a map of branch numbers.

    Args:
        layout: The layout before.
        shape: The shape before.
        move: The operation as a function of the one tensor.

    Returns:
        One layout for each tensor that comes out; None where there is nothing left.
    """
    labels = _labels(layout, len(shape)).expand(*shape)
    try:
        moved = move(labels)
    except RuntimeError:  # a view of the real tensor's memory, but not of the expanded one's
        moved = move(labels.contiguous())
    outputs = (moved,) if isinstance(moved, Tensor) else tuple(moved)
    return tuple(_read_layout(layout.parts, compact(output)) for output in outputs)


def _labels(layout: Concat, rank: int) -> Tensor:
    if layout.labels is not None:
        return layout.labels
    line = [float(index + 1) for index, width in layout.runs for _ in range(width)]
    view = [1] * rank
    view[layout.dim] = len(line)
    return torch.tensor(line, dtype=torch.float32, device="cpu").view(view)


def compact(labels: Tensor) -> Tensor:
    """Length 1 along every dimension along which nothing changes."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def _read_layout(parts: tuple[Part, ...], labels: Tensor) -> Concat | None:
    if not labels.numel():
        return None
    varying = [dim for dim, length in enumerate(labels.shape) if length > 1]
    if len(varying) > 1:
        return Concat(-1, (), parts, labels.clone())
    dim = varying[0] if varying else 0
    values, counts = torch.unique_consecutive(labels.flatten(), return_counts=True)
    runs = zip(values.int().tolist(), counts.tolist(), strict=True)
    return Concat(dim, tuple((index - 1, width) for index, width in runs), parts)
