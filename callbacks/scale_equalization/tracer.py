"""Watches a forward pass and notes which concatenation reaches which linear layer.

Why watching: module names, graph exporters and symbolic traces all need to know an architecture
or to understand all of its Python. A `TorchFunctionMode` sees the operations that really run, so
one short list of operations (`operations`) covers networks nobody has shown us. What is given up:
a branch taken only for other inputs is not seen, nor what runs inside TorchScript, and matrix
products written as `@` or einsum are reported, not followed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from . import operations as ops
from .folding import reparametrized, trained_weight
from .fusion import Fusion
from .patterns import DEFAULT_EXCLUDE, within
from .propagation import Operation, propagate, written
from .provenance import Concat, Origin, version
from .trace import Call, Trace

__all__ = ["Call", "Tracer", "clean_name", "trained_weights", "weight_key"]

MAX_RUNS = 64  # a channel shuffle of more slices than this is not followed
_UNKNOWN, _CONSTANT = Origin(), Origin(constant=True)
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Tracer(TorchFunctionMode):
    """Follows every tensor of a forward pass.

    While it is active, dropout does nothing, and a batch normalization that has one value per
    channel (batch 1, pooled to 1x1), which PyTorch refuses, normalizes over the channels instead.

    Args:
        model: Its parameters and modules give the names.
        consume: Called before every call of a linear layer; may return a weight to use instead.
        exclude: Patterns of modules that are left alone: what an encoder concatenates is one map
            to the layers behind it, and its maps are levels of their own when sums are judged.
    """

    def __init__(
        self,
        model: nn.Module,
        consume: Callable[[Call], Tensor | None] | None = None,
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
    ) -> None:
        super().__init__()
        self.trace = Trace()
        self.consume = consume
        self.origins: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}
        modules = dict(model.named_modules())
        self.names = {id(module): clean_name(name) for name, module in modules.items()}
        self.encoder = within(self.names.values(), exclude)
        self.parameters = {id(p) for m in modules.values() for p in m._parameters.values()}
        self.constants = {id(b) for m in modules.values() for b in m._buffers.values()}
        self.constants |= self.parameters
        self.constants.discard(id(None))  # a parameter or buffer that is left out
        self.reparametrized = {name: key for name, (_, key) in trained_weights(model).items()}
        self.computed: dict[tuple[str, str], int] = {}
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
        if isinstance(module, torch.jit.ScriptModule):
            self._note_script(module, args)

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
        name = ops.name_of(func)
        if name in ops.QUERIES:
            return func(*args, **kwargs)
        if name in ops.DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name in ops.CONSUMERS:
            return self._linear(name, func, args, kwargs)
        args, kwargs = self._steadied(name, args, kwargs)
        inputs = ops.tensors_in((*args, kwargs) if kwargs else args)
        origins = [self._origin(tensor) for tensor in inputs]  # before it changes them in place
        op = Operation(
            *(func, name, args, kwargs, self.module, inputs, origins),
            in_module=bool(self.stack),
            in_encoder=self.module in self.encoder,
        )
        result = func(*args, **kwargs)
        outputs = ops.tensors_in(result)
        for tensor, origin in zip(outputs, propagate(op, outputs, self.trace), strict=True):
            self._know(tensor, origin)
        if name in ("setitem", "copy"):
            self._note_writing(op)
        return result

    def _note_writing(self, op: Operation) -> None:
        """A map may be assembled by assigning slices of it, or by copying into views."""
        target = op.inputs[0] if op.name == "setitem" else op.inputs[0]._base
        if target is not None:
            self._know(target, written(op, self._origin(target)))

    def _know(self, tensor: Tensor, origin: Origin | None) -> None:
        if origin is None:
            return
        key = id(tensor)
        forget = weakref.ref(tensor, lambda _: self.origins.pop(key, None))
        self.origins[key] = (forget, origin)

    def _origin(self, tensor: Tensor) -> Origin:
        found = self.origins.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return _CONSTANT if id(tensor) in self.constants else _UNKNOWN
        origin = found[1]
        if origin.in_encoder and self.module not in self.encoder:
            return origin.but(concat=None, blocked=None, writes=0, in_encoder=False)
        if origin.concat is not None and origin.version != version(tensor):
            reason = "it was written to in place, through a view, after the concatenation"
            return origin.but(blocked=origin.blocked or reason)
        return origin

    # -- linear layers ---------------------------------------------------------------------

    def _linear(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        values = ops.argument(args, kwargs, 0, "input")
        weight = ops.argument(args, kwargs, 1, "weight")
        groups = 1 if name == "linear" else int(ops.argument(args, kwargs, 6, "groups", 1))
        origin = self._origin(values)
        layout, obstacle = _arriving(origin, values, values.dim() - 1 - ops.CONSUMERS[name])
        key = self._key(weight, name)
        call = Call(key, self.module, name, weight, groups, values, layout, origin, obstacle)
        self.trace.calls.setdefault(key, []).append(call.without_values())
        other = self.consume(call) if self.consume else None
        if other is not None:
            args, kwargs = ops.replaced(args, kwargs, 1, "weight", other)
        result = func(*args, **kwargs)
        self._know(result, self._made(call))
        return result

    def _made(self, call: Call) -> Origin:
        """What is known of a linear layer's result."""
        upstream, levels = call.origin.upstream, call.origin.levels
        if self.module in self.encoder:
            levels = frozenset((next(self.trace.levels),))
        elif call.kind in ops.TRANSPOSED:
            levels |= {next(self.trace.levels)}
        consumer = call.key if call.layout is not None else None
        if consumer is not None:
            upstream |= {consumer}
        constant = call.origin.constant
        return Origin(
            self.module, upstream=upstream, consumer=consumer, constant=constant, levels=levels
        )

    def _key(self, weight: Tensor, kind: str) -> int:
        """The weight's identity; a computed weight's is where it is used, as a negative number."""
        if id(weight) in self.parameters:
            return id(weight)
        if self.module in self.reparametrized:
            return self.reparametrized[self.module]
        return self.computed.setdefault((self.module, kind), -1 - len(self.computed))

    # -- operations that need help ---------------------------------------------------------

    def _steadied(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        """The arguments without dropout, and without batch statistics of a single value."""
        if name == "batch_norm":
            return self._lone_values(args, kwargs)
        if name == "scaled_dot_product_attention":
            return ops.replaced(args, kwargs, 4, "dropout_p", 0.0)
        if name == "multi_head_attention_forward":
            return ops.replaced(args, kwargs, 10, "dropout_p", 0.0)
        return args, kwargs

    def _lone_values(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[Sequence[Any], dict[str, Any]]:
        values = ops.argument(args, kwargs, 0, "input")
        training = ops.argument(args, kwargs, 5, "training", False)
        if not training or values.dim() < 2 or values.numel() != values.shape[1]:
            return args, kwargs
        self.trace.lone_norms += 1
        spread, centre = torch.var_mean(values.detach().float(), correction=0)
        args, kwargs = ops.replaced(args, kwargs, 5, "training", False)
        args, kwargs = ops.replaced(args, kwargs, 1, "running_mean", centre.expand(values.shape[1]))
        return ops.replaced(args, kwargs, 2, "running_var", spread.expand(values.shape[1]))

    def _note_script(self, module: nn.Module, args: Any) -> None:
        """A scripted or traced module runs out of sight: say so if a concatenation is involved."""
        takes = any(self._origin(tensor).concat for tensor in ops.tensors_in(args))
        graph: Any = getattr(module, "inlined_graph", "")
        if takes or "aten::cat" in str(graph):
            reason = "it is TorchScript: what it concatenates or consumes inside is not seen"
            self.trace.lost.append((self.module, reason))


def _arriving(origin: Origin, values: Tensor, dim: int) -> tuple[Concat | None, str]:
    """The concatenation along an input's channels, and what is in the way of equalizing it."""
    layout = origin.concat
    if layout is None:
        return None, origin.blocked or ""
    if layout.labels is not None and layout.labels.shape[dim] > 1:
        return None, "its branches are interleaved differently from position to position"
    if layout.dim != dim or layout.channels() != values.shape[dim]:
        return None, ""  # concatenated tokens or pixels: not channels, no fusion of scales
    return layout, _obstacle(origin, layout, values)


def _obstacle(origin: Origin, layout: Concat, values: Tensor) -> str:
    if origin.blocked:
        return origin.blocked
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        return "it runs inside torch.func.vmap or grad, where a branch cannot be measured"
    if any(part.tensor.is_complex() for part in layout.parts):
        return "a branch is complex-valued; its scale is not defined here"
    if len(layout.runs) > MAX_RUNS:
        return f"its branches are interleaved in {len(layout.runs)} slices, more than {MAX_RUNS}"
    return ""


def clean_name(name: str) -> str:
    """A module's name without what compiling, checkpointing and sharding add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def weight_key(model: nn.Module, fusion: Fusion) -> int:
    """What `Call.key` is when a fusion's layer is called, be it reparametrized or not."""
    return id(trained_weight(model, fusion))


def trained_weights(model: nn.Module) -> dict[str, tuple[str, int]]:
    """For each reparametrized layer, its weight's name and the identity of what is trained."""
    found: dict[str, tuple[str, int]] = {}
    if not any("parametrizations" in module._modules for module in model.modules()):
        return found
    for name, layer in reparametrized(model):
        for parameter, chain in layer.parametrizations.items():  # type: ignore[operator, union-attr]
            found[clean_name(name)] = (parameter, id(chain.original))
    return found
