"""Watches a forward pass and notes which concatenation reaches which linear layer.

Why watching: module names, graph exporters and symbolic traces all need to know an architecture
or to understand all of its Python. A `TorchFunctionMode` sees the operations that really run, so
one short list of operations (`provenance`) covers networks nobody has shown us. What is given up:
a branch taken only for other inputs is not seen, and matrix products written as `@` or einsum are
not taken for linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from . import provenance as pv
from .provenance import Concat, Origin


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a linear layer: what the tracer hands to whoever listens.

    Attributes:
        key: Identity of the weight.
        module: Name of the module that made the call.
        kind: "conv2d", "linear", ...
        weight: The weight as it was passed.
        groups: Groups of a convolution, else 1.
        values: Its input.
        layout: The concatenation along its input channels, or None for any other input.
        origin: What is known of its input.
    """

    key: int
    module: str
    kind: str
    weight: Tensor
    groups: int
    values: Tensor
    layout: Concat | None
    origin: Origin


@dataclass(eq=False)
class Sum:
    """An addition of two feature maps: the module it happened in, and the summands."""

    module: str
    summands: tuple[Origin, ...]


@dataclass(eq=False)
class Trace:
    """The raw notes of one or more forward passes."""

    calls: dict[int, list[Call]] = field(default_factory=dict)
    norms: dict[int, str] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    lone_norms: int = 0


class Tracer(TorchFunctionMode):
    """Follows every tensor of a forward pass.

    While it is active, dropout does nothing, and a batch normalization that has one value per
    channel (batch 1, pooled to 1x1), which PyTorch refuses, normalizes over the channels instead.

    Args:
        model: Its parameters and modules give the names.
        consume: Called before every call of a linear layer whose input is a concatenation or
            known to be none; may return a weight to use instead.
    """

    def __init__(
        self, model: nn.Module, consume: Callable[[Call], Tensor | None] | None = None
    ) -> None:
        super().__init__()
        self.trace = Trace()
        self.consume = consume
        self.origins: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.names = {id(m): clean_name(name) for name, m in model.named_modules()}
        self.stack: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[Tracer]:
        """The tracer in action, with the names of the running modules at hand."""
        enter = module_hooks.register_module_forward_pre_hook(self._enter)
        leave = module_hooks.register_module_forward_hook(self._leave, always_call=True)
        try:
            with self:
                yield self
        finally:
            enter.remove()
            leave.remove()
            self.stack.clear()
            self.origins.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.stack.append(self.names.get(id(module), self.module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.stack:
            self.stack.pop()

    @property
    def module(self) -> str:
        """Name of the innermost known module that is running."""
        return self.stack[-1] if self.stack else ""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        if name in ("get", "set", "size", "dim"):
            return func(*args, **kwargs)
        if name in pv.DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name in pv.CONSUMERS:
            return self._linear(name, func, args, kwargs)
        if name == "batch_norm":
            args, kwargs = self._lone_values(args, kwargs)
        if name == "scaled_dot_product_attention":
            args, kwargs = _without_dropout(args, kwargs)
        before = self._first(args, kwargs)
        result = func(*args, **kwargs)
        self._note(name, func, args, kwargs, before, result)
        return result

    # -- linear layers ---------------------------------------------------------------------

    def _linear(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        values = _argument(args, kwargs, 0, "input")
        weight = _argument(args, kwargs, 1, "weight")
        groups = 1 if name == "linear" else int(_argument(args, kwargs, 6, "groups", 1))
        origin = self._origin(values)
        dim = values.dim() - 1 - pv.CONSUMERS[name]
        layout = origin.concat
        if layout is not None and (layout.dim != dim or layout.channels() != values.shape[dim]):
            layout = None  # concatenated tokens or pixels: not channels, no fusion of scales
        call = Call(id(weight), self.module, name, weight, groups, values, layout, origin)
        self.trace.calls.setdefault(call.key, []).append(_without_values(call))
        other = self.consume(call) if self.consume else None
        if other is not None:
            args, kwargs = _replaced(args, kwargs, 1, "weight", other)
        result = func(*args, **kwargs)
        fused = layout is not None
        upstream = origin.upstream | {call.key} if fused else origin.upstream
        self.origins[result] = Origin(
            self.module, upstream=upstream, consumer=call.key if fused else None
        )
        return result

    # -- everything else -------------------------------------------------------------------

    def _note(
        self,
        name: str,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        before: tuple[Tensor, torch.Size] | None,
        result: Any,
    ) -> None:
        outputs = _tensors(result)
        if not outputs:
            return
        inputs = _tensors([*args, *kwargs.values()])
        origins = [self._origin(t) for t in inputs]
        upstream = frozenset().union(*(o.upstream for o in origins))
        made = self._derive(name, func, args, kwargs, before, outputs, inputs, origins)
        for tensor, origin in zip(outputs, made, strict=True):
            self.origins[tensor] = replace(origin, upstream=upstream)

    def _derive(
        self,
        name: str,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        before: tuple[Tensor, torch.Size] | None,
        outputs: list[Tensor],
        inputs: list[Tensor],
        origins: list[Origin],
    ) -> list[Origin]:
        fresh = [Origin(self.module)] * len(outputs)
        if before is None:
            return fresh
        origin, shape = self._origin(before[0]), before[1]
        if name in pv.CONCATENATIONS | pv.STACKS:
            return [self._joined(name, args, kwargs, outputs[0])]
        if name in pv.RESIZES and outputs[0].dim() > 2:
            mode = _argument(args, kwargs, 3, "mode", "nearest") if name == "interpolate" else name
            return [pv.resized(origin, before[0], outputs[0], str(mode))]
        if name in pv.HOMOGENEOUS and _is_homogeneous(name, args, kwargs):
            return [origin] * len(outputs)
        if name in pv.STRUCTURAL:
            return self._moved(func, args, kwargs, before, len(outputs))
        if name in ("batch_norm", "instance_norm") and origin.consumer is not None:
            self.trace.norms.setdefault(origin.consumer, self.module)
        if name in pv.SUMS:
            self._note_sum(inputs, origins)
        return [self._blocked(name, origins, inputs, out, shape) for out in outputs]

    def _joined(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], result: Tensor
    ) -> Origin:
        tensors = list(_argument(args, kwargs, 0, "tensors"))
        axis = kwargs.get("axis", 0)
        dim = int(_argument(args, kwargs, 1, "dim", axis))
        kept = [t for t in tensors if t.numel() or t.dim() > 1]
        origins = [self._origin(t) for t in kept]
        self.trace.seen.append(
            f"{name}(dim={dim}) of {', '.join(str(tuple(t.shape)) for t in kept)} "
            f"in {self.module or 'the model'}"
        )
        if len(kept) == 1 and name in pv.CONCATENATIONS:
            return origins[0]
        join = pv.concatenate if name in pv.CONCATENATIONS else pv.stack
        return Origin(self.module, concat=join(kept, origins, dim))

    def _moved(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        before: tuple[Tensor, torch.Size],
        n_outputs: int,
    ) -> list[Origin]:
        origin = self._origin(before[0])
        if origin.concat is None:
            return [origin] * n_outputs
        layouts = pv.rearranged(
            origin.concat,
            before[1],
            lambda ruler: func(*_swapped(args, before[0], ruler), **kwargs),
        )
        return [replace(origin, concat=layout) for layout in layouts]

    def _blocked(
        self,
        name: str,
        origins: list[Origin],
        inputs: list[Tensor],
        out: Tensor,
        shape: torch.Size,
    ) -> Origin:
        """The origin behind any other operation: its layout survives where the shape does."""
        for tensor, origin in zip(inputs, origins, strict=True):
            layout = origin.concat
            if layout is None or tensor.dim() != out.dim():
                continue
            if out.shape[layout.dim] == layout.channels():
                reason = origin.blocked or pv.obstacle(name)
                return Origin(self.module, concat=layout, blocked=reason)
        return Origin(self.module)

    def _note_sum(self, inputs: list[Tensor], origins: list[Origin]) -> None:
        if len(inputs) == 2 and inputs[0].shape == inputs[1].shape and inputs[0].dim() > 2:
            summands = tuple(replace(origin, concat=None) for origin in origins)
            self.trace.sums.append(Sum(self.module, summands))

    def _lone_values(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        values = _argument(args, kwargs, 0, "input")
        training = _argument(args, kwargs, 5, "training", False)
        if not training or values.numel() != values.shape[1]:
            return args, kwargs
        self.trace.lone_norms += 1
        flat = values.detach().float()
        spread, centre = torch.var_mean(flat, correction=0)
        args, kwargs = _replaced(args, kwargs, 5, "training", False)
        args, kwargs = _replaced(args, kwargs, 1, "running_mean", centre.expand(values.shape[1]))
        return _replaced(args, kwargs, 2, "running_var", spread.expand(values.shape[1]))

    def _origin(self, tensor: Tensor) -> Origin:
        found = self.origins.get(tensor, None)  # type: ignore[no-untyped-call]
        return found if isinstance(found, Origin) else Origin()

    def _first(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Tensor, torch.Size] | None:
        tensors = _tensors([*args, *kwargs.values()])
        return (tensors[0], tensors[0].shape) if tensors else None


def clean_name(name: str) -> str:
    """A module's name without what wrappers add to it."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts)


def _is_homogeneous(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this very call passes the scale on: no product with a map, no constant padding."""
    if name in pv.BINARY_HOMOGENEOUS:
        factors = [a for a in (*args, *kwargs.values()) if isinstance(a, (int, float))]
        scalars = all(t.numel() == 1 for t in _tensors(list(args))[1:])
        return scalars and all(factor > 0 for factor in factors)
    return name != "pad" or not _argument(args, kwargs, 3, "value", 0.0)


def _without_values(call: Call) -> Call:
    """The call as a note: what it says of the layout, without keeping feature maps alive."""
    origin, nothing = replace(call.origin, concat=None), torch.empty(0)
    if call.layout is None:
        return replace(call, origin=origin, values=nothing)
    parts = tuple(replace(part, tensor=nothing) for part in call.layout.parts)
    layout = replace(call.layout, parts=parts)
    return replace(call, origin=origin, values=nothing, layout=layout)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in _tensors(item)]
    return []


def _argument(
    args: Sequence[Any], kwargs: dict[str, Any], index: int, name: str, default: Any = None
) -> Any:
    return args[index] if index < len(args) else kwargs.get(name, default)


def _replaced(
    args: Sequence[Any], kwargs: dict[str, Any], index: int, name: str, value: Any
) -> tuple[Sequence[Any], dict[str, Any]]:
    if index < len(args):
        return (*args[:index], value, *args[index + 1 :]), kwargs
    return args, {**kwargs, name: value}


def _swapped(args: Sequence[Any], old: Tensor, new: Tensor) -> list[Any]:
    return [new if arg is old else arg for arg in args]


def _without_dropout(
    args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Sequence[Any], dict[str, Any]]:
    return _replaced(args, kwargs, 4, "dropout_p", 0.0)
