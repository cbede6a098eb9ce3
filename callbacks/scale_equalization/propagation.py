"""What an operation makes of the facts known about its inputs (`provenance.Origin`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import operations as ops
from .provenance import NO_LEVELS, Concat, Origin, concatenate, rearranged, resized, stack, version
from .trace import Trace

FILLED = "it was filled slice by slice (x[...] = y), which is not followed"
_CONTRACTIONS = {"matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "inner"}


@dataclass(eq=False)
class Operation:
    """One operation before it runs, in-place ones included.

    Attributes:
        func: The function.
        name: Its one name.
        args: Arguments.
        kwargs: Keyword arguments.
        module: Name of the module it runs in.
        inputs: All tensors among the arguments.
        origins: What is known of each.
        in_module: Whether any module is running.
        in_encoder: Whether the module is one that is left alone.
    """

    func: Any
    name: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    module: str
    inputs: list[Tensor]
    origins: list[Origin]
    in_module: bool = True
    in_encoder: bool = False

    def __post_init__(self) -> None:
        place = self._place()
        self.subject = self.inputs[place] if self.inputs else None
        self.origin = self.origins[place] if self.inputs else Origin()
        self.shape = tuple(self.subject.shape) if self.subject is not None else ()
        others = self.origins[:place] + self.origins[place + 1 :]
        self.factors_are_fixed = all(origin.constant for origin in others)

    def _place(self) -> int:
        """Which input the result is about: a concatenation before a map before a parameter."""
        if self.name in ops.UNARY:
            return 0
        ranks = [1 if o.concat is not None else 2 if not o.constant else 3 for o in self.origins]
        return ranks.index(min(ranks)) if ranks else 0

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return ops.argument(self.args, self.kwargs, index, name, default)

    def on(self, other: Tensor) -> Any:
        """The same operation with another tensor, on the CPU, in the subject's place."""

        def exchange(tensor: Tensor) -> Tensor:
            return other if tensor is self.subject else tensor.cpu()

        args, kwargs = (tree_map_only(Tensor, exchange, t) for t in (self.args, self.kwargs))
        return self.func(*args, **kwargs)


def propagate(op: Operation, outputs: list[Tensor], trace: Trace) -> list[Origin]:
    """What is known of each result, given what was known of the inputs."""
    if not outputs:
        return []
    made = _derive(op, outputs, trace)
    upstream = _union([origin.upstream for origin in op.origins])
    constant = op.name in ops.FACTORIES or _is_constant(op)
    levels = _levels(op, trace)
    return [
        origin.but(
            upstream=upstream,
            constant=constant,
            levels=levels,
            version=version(output) if origin.concat is not None else -1,
            in_encoder=op.in_encoder,
        )
        for origin, output in zip(made, outputs, strict=True)
    ]


def _is_constant(op: Operation) -> bool:
    """Whether the result depends on parameters and numbers only; no image is made in a module."""
    if not op.inputs:
        return op.in_module and op.name not in ops.RANDOM
    return all(origin.constant for origin in op.origins)


def _union(sets: Sequence[frozenset[Any]]) -> frozenset[Any]:
    filled = {each for each in sets if each}
    if len(filled) > 1:
        return frozenset().union(*filled)
    return filled.pop() if filled else frozenset()


def _levels(op: Operation, trace: Trace) -> frozenset[int]:
    if op.in_encoder:
        return frozenset((next(trace.levels),))
    if op.name in ops.FACTORIES:
        return NO_LEVELS
    levels = _union([origin.levels for origin in op.origins])
    if op.name in ops.RESIZES:
        return levels | {next(trace.levels)}
    return levels


def _derive(op: Operation, outputs: list[Tensor], trace: Trace) -> list[Origin]:
    if op.subject is None or op.name in ops.FACTORIES:
        return [Origin(op.module)] * len(outputs)
    if op.name in ops.CONCATENATIONS or op.name in ops.STACKS:
        return [_joined(op, outputs[0], trace)]
    if op.name in ops.RESIZES and outputs[0].dim() > 2:
        return [_resized(op, outputs[0])]
    if op.name in ops.HOMOGENEOUS and _passes_scale_on(op, outputs[0]):
        return [_kept(op, output) for output in outputs]
    if op.name in ops.STRUCTURAL and outputs[0].dtype == op.subject.dtype:
        return _moved(op, len(outputs))
    if op.name in ops.REDUCTIONS and op.origin.concat is not None:
        return [_reduced(op, trace)]
    if op.name in ops.SUMS and _adds_nothing(op):
        return [op.origin]
    if op.name in ops.PATCHES and op.origin.concat is not None:
        return [_lost(op, _changed(op))] * len(outputs)
    _take_notes(op, outputs[0], trace)
    return [_through(op, output) for output in outputs]


def _adds_nothing(op: Operation) -> bool:
    """Whether this is the first step of Python's sum() over a list of maps: 0 + x."""
    numbers = [arg for arg in op.args if isinstance(arg, (int, float))]
    return len(op.inputs) == 1 and numbers == [0]


def _passes_scale_on(op: Operation, output: Tensor) -> bool:
    exact = output.is_floating_point() or op.subject is None or output.dtype == op.subject.dtype
    return exact and ops.is_homogeneous(op.name, op.args, op.kwargs, op.factors_are_fixed)


def _joined(op: Operation, result: Tensor, trace: Trace) -> Origin:
    dim = ops.join_dim(op.name, op.args, op.kwargs)
    tensors = ops.tensors_in(op.argument(0, "tensors"))
    trace.seen.append(
        f"{op.name}(dim={dim}) of {', '.join(str(tuple(t.shape)) for t in tensors)} "
        f"in {op.module or 'the model'}"
    )
    dim = dim % max(result.dim(), 1)
    pairs = [(t, o) for t, o in zip(tensors, op.origins, strict=False) if t.numel()]
    rank = result.dim() - (op.name in ops.STACKS)
    if not pairs or rank < 1 or any(t.dim() != rank for t, _ in pairs):
        return Origin(op.module)
    kept, origins = zip(*pairs, strict=True)
    if all(origin.constant for origin in origins):
        return Origin(op.module)  # a table of positions or the like: no features
    if op.name in ops.STACKS:
        return Origin(op.module, concat=stack(kept, origins, dim))
    if len(kept) == 1:
        return pairs[0][1]
    return Origin(op.module, concat=concatenate(kept, origins, dim, result))


def _resized(op: Operation, output: Tensor) -> Origin:
    before, after = op.shape, tuple(output.shape)
    if before == after:
        return op.origin
    if len(before) != len(after):
        return Origin(op.module)
    rows, columns = (after[i] / max(before[i], 1) for i in (-2 if len(after) > 3 else -1, -1))
    mode = ops.resize_mode(op.func, op.name, op.args, op.kwargs)
    return resized(op.origin, rows if rows != 1.0 else columns, mode)


def _kept(op: Operation, output: Tensor) -> Origin:
    """The origin behind an operation that passes every branch's scale on."""
    origin, layout = op.origin, op.origin.concat
    if origin.consumer is not None and ops.bends(op.name):
        origin = origin.but(bent=True)
    if "pool" in op.name:
        origin = origin.but(source=op.module, upsampling=1.0, interpolation=None)
    if layout is None or (op.subject is not None and _fits(layout, op.subject, output)):
        return origin
    return _lost(op, _changed(op))


def _changed(op: Operation) -> str:
    return f"the operation {op.name} changes the concatenation's channels"


def _lost(op: Operation, reason: str) -> Origin:
    return Origin(op.module, blocked=op.origin.blocked or reason)


def _moved(op: Operation, n_outputs: int) -> list[Origin]:
    origin = op.origin
    if origin.concat is None:
        return [Origin(op.module) if op.name in ops.SHUFFLES else origin] * n_outputs
    try:
        layouts = rearranged(origin.concat, op.shape, op.on)
    except (RuntimeError, IndexError, TypeError):  # it does not work on a map of numbers
        return [_lost(op, _changed(op))] * n_outputs
    return [_with_layout(op, layout) for layout in layouts]


def _with_layout(op: Operation, layout: Any) -> Origin:
    """The origin with the layout that is left; a single branch is that branch again."""
    left = {index for index, _ in layout.runs} if layout is not None else set()
    if layout is not None and (layout.labels is not None or len(left) > 1):
        return op.origin.but(concat=layout)
    if len(left) != 1 or op.origin.blocked:
        return Origin(op.module)
    part = layout.parts[left.pop()]
    return Origin(part.source, part.upsampling, part.interpolation)


def _reduced(op: Operation, trace: Trace) -> Origin:
    """Sums and means: over positions they pass scales on, over the branches they fuse them."""
    layout = op.origin.concat
    dims = op.argument(1, "dim", op.kwargs.get("axis"))
    rank = len(op.shape)
    dims = range(rank) if dims is None else (dims,) if isinstance(dims, int) else dims
    gone = {dim % rank for dim in dims}
    assert layout is not None
    if layout.labels is not None:
        return Origin(op.module)
    if layout.dim in gone:
        if all(width == 1 for _, width in layout.runs):
            trace.note_sum(op.module, layout.parts)
        return Origin(op.module)
    keeps = bool(op.argument(2, "keepdim", False))
    shift = 0 if keeps else sum(dim < layout.dim for dim in gone)
    return op.origin.but(source=op.module, concat=replace(layout, dim=layout.dim - shift))


def _through(op: Operation, output: Tensor) -> Origin:
    """The origin behind any other operation: a layout survives where the shape does, blocked."""
    for tensor, origin in zip(op.inputs, op.origins, strict=True):
        if origin.concat is not None and _fits(origin.concat, tensor, output):
            reason = origin.blocked or ops.obstacle(op.name)
            return Origin(op.module, concat=origin.concat, blocked=reason)
    lost = next((o.blocked for o in op.origins if o.blocked and o.concat is None), None)
    if op.factors_are_fixed and tuple(output.shape) == op.shape:  # an activation, a norm
        made = op.origin
        return Origin(op.module, made.upsampling, made.interpolation, blocked=lost)
    return Origin(op.module, blocked=lost)


def _fits(layout: Concat, before: Tensor, after: Tensor) -> bool:
    """Whether a layout can still be that of the result."""
    if before.shape == after.shape:
        return True
    same_rank = layout.labels is None and before.dim() == after.dim()
    return same_rank and after.shape[layout.dim] == layout.channels()


def _take_notes(op: Operation, output: Tensor, trace: Trace) -> None:
    consumer = op.origin.consumer
    if op.name in ops.CHANNEL_NORMS and consumer is not None:
        trace.cancelled.setdefault(consumer, op.module)
        if not op.origin.bent:
            trace.norms.setdefault(consumer, op.module)
    if op.name in ops.SUMS and _adds_maps(op, output):
        trace.note_sum(op.module, op.origins)
    if ops.is_opaque(op.func, op.name):
        reason = _taken_by_weight(op, output)
        if reason:
            trace.lost.append((op.module, reason))


def _adds_maps(op: Operation, output: Tensor) -> bool:
    """Whether two maps of one shape are added, neither of them a parameter or a mere vector."""
    shapes = {tensor.shape for tensor in op.inputs}
    if len(op.inputs) != 2 or shapes != {output.shape} or output.dim() < 3:
        return False
    positions = output.numel() // (output.shape[0] * output.shape[1]) if output.numel() else 0
    return positions > 1 and not any(origin.constant for origin in op.origins)


def _taken_by_weight(op: Operation, output: Tensor) -> str:
    """Why a concatenation ends here, if it is multiplied by a weight in a way not followed."""
    layout = op.origin.concat
    if layout is None or layout.labels is not None or len(layout.runs) < 2:
        return ""
    if op.name not in ops.OPAQUE and tuple(output.shape) == op.shape:
        return ""  # a custom activation, most likely; it blocks, but consumes nothing
    rank, dim = len(op.shape), layout.dim
    if op.name in _CONTRACTIONS or op.name in ("einsum", "tensordot"):
        if not any(origin.constant for origin in op.origins):
            return ""  # attention: both factors are maps
        if op.name in _CONTRACTIONS and dim != _contracted(op, rank):
            return ""
    elif dim not in (1, rank - 1):
        return ""
    return op.origin.blocked or (
        f"its branches go into {op.name}, which is not followed: only convolutions and F.linear are"
    )


def _contracted(op: Operation, rank: int) -> int:
    """The dimension of the subject that a matrix product sums over."""
    first = 1 if op.name.startswith(("add", "badd")) else 0
    is_left = len(op.inputs) > first and op.inputs[first] is op.subject
    return rank - 1 if is_left or op.name == "inner" else max(rank - 2, 0)


def written(op: Operation, before: Origin) -> Origin | None:
    """What is known of a tensor after ``tensor[...] = value`` or a copy into a view of it."""
    value, source = op.inputs[-1], op.origins[-1]
    if value.numel() < 2 or len(op.inputs) < 2 or source.constant:
        return None
    if before.concat is not None:
        return None  # noticed by its version
    writes = before.writes + 1
    return before.but(
        source=op.module,
        blocked=FILLED if writes > 1 else before.blocked,
        writes=writes,
        upstream=before.upstream | source.upstream,
        levels=before.levels | source.levels,
    )
