"""Where a tensor comes from: the few facts about it that decide whether a fusion can be folded.

Values only; `tracing` watches the forward pass and asks this file what an operation does to them.
Operations are known by name, so `torch.relu`, `F.relu`, `Tensor.relu` and `Tensor.relu_` are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
STACKS = frozenset({"stack"})
RESIZES = frozenset({"interpolate", "upsample", "upsample_nearest", "upsample_bilinear"})
CONVOLUTIONS = {f"conv{n}d": n for n in (1, 2, 3)}
TRANSPOSED = {f"conv_transpose{n}d": n for n in (1, 2, 3)}
CONSUMERS = {**CONVOLUTIONS, **TRANSPOSED, "linear": 0}

DROPOUTS = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
    | {"feature_dropout"}
)
# f(a x) = a f(x) for every a > 0, element by element: the branch scale goes through unchanged.
HOMOGENEOUS = frozenset(
    {"relu", "leaky_relu", "prelu", "abs", "clone", "contiguous", "detach", "alias"}
    | {"to", "type", "type_as", "float", "half", "double", "bfloat16", "requires_grad"}
    | {"mul", "multiply", "div", "divide", "true_divide", "pad", "constant_pad_nd"}
)
BINARY_HOMOGENEOUS = frozenset({"mul", "multiply", "div", "divide", "true_divide"})
# These move elements about and change none.
STRUCTURAL = frozenset(
    {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "reshape", "view"}
    | {"flatten", "unflatten", "squeeze", "unsqueeze", "getitem", "narrow", "chunk", "split"}
    | {"tensor_split", "unbind", "select", "index_select", "expand", "expand_as", "flip", "roll"}
    | {"rot90", "t", "channel_shuffle", "repeat", "tile", "ravel", "view_as", "reshape_as"}
)
NORMALIZATIONS = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "normalize", "rms_norm"}
    | {"native_batch_norm", "native_layer_norm", "native_group_norm", "local_response_norm"}
)
PRODUCTS = frozenset(
    BINARY_HOMOGENEOUS
    | {"matmul", "bmm", "einsum", "scaled_dot_product_attention", "softmax", "sigmoid", "tanh"}
    | {"multi_head_attention_forward", "baddbmm", "addcmul"}
)
SUMS = frozenset({"add", "sub", "subtract", "sum", "addcdiv"})


@dataclass(frozen=True, eq=False)
class Part:
    """A slice of a tensor just before its concatenation: the branch as the method measures it."""

    tensor: Tensor
    dim: int
    start: int
    width: int
    version: int
    upsampling: float
    interpolation: str | None
    source: str

    def values(self) -> Tensor | None:
        """The branch's values, or None if they were overwritten after the concatenation."""
        if self.tensor._version != self.version:
            return None
        return self.tensor.narrow(self.dim, self.start, self.width)


@dataclass(frozen=True, eq=False)
class Concat:
    """The layout of a concatenation: along `dim`, runs of (index into parts, channels)."""

    dim: int
    runs: tuple[tuple[int, int], ...]
    parts: tuple[Part, ...]

    def channels(self) -> int:
        """Number of channels along `dim`."""
        return sum(width for _, width in self.runs)


@dataclass(frozen=True, eq=False)
class Origin:
    """What is known of one tensor.

    Attributes:
        source: Module that made it.
        upsampling: Ratio of heights gained by resizing since then.
        interpolation: Mode of the last resizing since then.
        concat: Its layout, if it is (still) a concatenation.
        blocked: Why the concatenation's scales no longer reach a consumer unchanged.
        upstream: Keys of consumers of concatenations whose output reaches it.
        consumer: Key of the consumer whose output it is, up to homogeneous operations.
    """

    source: str = ""
    upsampling: float = 1.0
    interpolation: str | None = None
    concat: Concat | None = None
    blocked: str | None = None
    upstream: frozenset[int] = field(default_factory=frozenset)
    consumer: int | None = None


def concatenate(tensors: Sequence[Tensor], origins: Sequence[Origin], dim: int) -> Concat:
    """Layout of ``torch.cat(tensors, dim)``: nested concatenations become their atomic branches."""
    parts: list[Part] = []
    runs: list[tuple[int, int]] = []
    for tensor, origin in zip(tensors, origins, strict=True):
        dim = dim % tensor.dim()
        layout = origin.concat
        if layout is None or layout.dim != dim or origin.blocked:
            runs.append((len(parts), tensor.shape[dim]))
            parts.append(_part(tensor, dim, 0, tensor.shape[dim], origin))
            continue
        start = 0
        for index, width in layout.runs:
            inner = layout.parts[index]
            runs.append((len(parts), width))
            parts.append(_part(tensor, dim, start, width, inner))
            start += width
    return Concat(dim, tuple(runs), tuple(parts))


def stack(tensors: Sequence[Tensor], origins: Sequence[Origin], dim: int) -> Concat:
    """Layout of ``torch.stack(tensors, dim)``: one run of width 1 for each tensor."""
    rank = tensors[0].dim() + 1
    parts = tuple(
        _part(tensor, 0, 0, tensor.shape[0] if tensor.dim() else 1, origin)
        for tensor, origin in zip(tensors, origins, strict=True)
    )
    return Concat(dim % rank, tuple((i, 1) for i in range(len(parts))), parts)


def _part(tensor: Tensor, dim: int, start: int, width: int, facts: Origin | Part) -> Part:
    return Part(
        tensor,
        dim,
        start,
        width,
        tensor._version,
        facts.upsampling,
        facts.interpolation,
        facts.source,
    )


def resized(origin: Origin, before: Tensor, after: Tensor, mode: str) -> Origin:
    """The origin of ``interpolate(before, mode=mode)``; to the same size, that changes nothing."""
    if before.shape == after.shape:
        return origin
    ratio = after.shape[2] / before.shape[2] if before.dim() > 2 else 1.0
    layout = origin.concat
    if layout is not None:
        parts = tuple(
            replace(part, upsampling=part.upsampling * ratio, interpolation=mode)
            for part in layout.parts
        )
        layout = replace(layout, parts=parts)
    return replace(origin, upsampling=origin.upsampling * ratio, interpolation=mode, concat=layout)


def rearranged(
    layout: Concat, shape: torch.Size, move: Callable[[Tensor], Any]
) -> tuple[Concat | None, ...]:
    """Layouts after a structural operation, found by moving a tensor of branch numbers.

    Args:
        layout: The layout before.
        shape: The shape before.
        move: The operation as a function of the one tensor.

    Returns:
        One layout for each tensor that comes out; None where branches are no longer runs along
        one dimension.
    """
    ruler = torch.cat([torch.full((width,), i) for i, (_, width) in enumerate(layout.runs)])
    view = [1] * len(shape)
    view[layout.dim] = len(ruler)
    moved = move(ruler.view(view).expand(shape))
    outputs = (moved,) if isinstance(moved, Tensor) else tuple(moved)
    return tuple(_read_layout(layout, labels) for labels in outputs)


def _read_layout(layout: Concat, labels: Tensor) -> Concat | None:
    for dim in range(labels.dim()):
        line = labels
        for other in reversed(range(labels.dim())):
            if other != dim:
                line = line.select(other, 0)
        view = [1] * labels.dim()
        view[dim] = len(line)
        if len(line) > 1 and torch.equal(line.view(view).expand(labels.shape), labels):
            values, counts = torch.unique_consecutive(line, return_counts=True)
            runs = zip(values.tolist(), counts.tolist(), strict=True)
            return Concat(dim, tuple((layout.runs[i][0], n) for i, n in runs), layout.parts)
    return None


def obstacle(name: str) -> str:
    """Why an operation between a concatenation and its consumer prevents folding."""
    if name in NORMALIZATIONS:
        return f"a normalization ({name}) lies between; it already removes the branch scale"
    if name in PRODUCTS:
        return f"a product or attention ({name}) lies between; its scale is not linear in a branch"
    if name in SUMS:
        return f"a sum ({name}) lies between; the other summand has no slice of its own"
    return f"the operation {name} lies between; it does not pass a branch's scale on unchanged"
