"""Watches a forward pass: every join, every linear layer, every sum, with the modules' names.

A `TorchFunctionMode` sees the operations that really run, knows parameters by identity, works above
autocast and needs no export. What is given up: what runs inside TorchScript or compiled extensions,
and paths that this batch does not take.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from scale_equalization.layers import SCALED, reparametrized, trained_parameter
from scale_equalization.patterns import DEFAULT_EXCLUDE, clean_name, within

from . import operations as ops
from .calls import Call, Log
from .notes import NONE, Join, Note, follow, union, with_writing
from .remarks import Remarks
from .steadying import steadied

SumLocation = tuple[str, int]  # module a sum happens in, and its number there


class Observer(TorchFunctionMode):
    """Watches, and lets subclasses exchange what is joined, what a layer returns, what is added.

    While it is active, dropout does nothing, and a batch normalization that has one value per
    channel (batch 1, pooled to 1x1), which PyTorch refuses, normalizes over the channels instead.

    Args:
        model: Its parameters and modules give the names.
        exclude: Patterns of modules that are left alone: what an encoder joins is one map to the
            layers behind it, and its maps are levels of their own when sums are compared.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str] = DEFAULT_EXCLUDE) -> None:
        super().__init__()
        self.log = Log()
        self._notes: dict[int, tuple[weakref.ref[Tensor], Note]] = {}
        modules = dict(model.named_modules())
        self.names = {id(m): clean_name(name) for name, m in modules.items()}
        self.encoder = within(self.names.values(), exclude)
        self.parameters = {id(p) for m in modules.values() for p in m._parameters.values()}
        buffers = {id(b) for m in modules.values() for b in m._buffers.values()}
        self.constants = (self.parameters | buffers) - {id(None)}  # None: a bias left out
        self.reparametrized = {
            clean_name(name): id(trained_parameter(layer, getattr(layer, SCALED)))
            for name, layer in reparametrized(model)
        }
        self.remarks = Remarks(self.log, self.parameters, self.reparametrized)
        self._computed: dict[tuple[str, str], int] = {}
        self._stack: list[tuple[str, Any]] = []
        self._levels = itertools.count()
        self._calls = itertools.count()
        self._sums: dict[str, Iterator[int]] = {}

    # -- for subclasses --------------------------------------------------------------------

    def join(self, join: Join, part: int, values: Tensor) -> Tensor:
        """What is joined in the place of operand `part`."""
        return values

    def consume(self, call: Call) -> Tensor | None:
        """What a linear layer returns; None lets it run as it is."""
        return None

    def adding(
        self, location: SumLocation, operands: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What is added in the place of two maps of one shape."""
        return operands

    def added(
        self, location: SumLocation, operands: tuple[Tensor, Tensor], total: Tensor, fuses: bool
    ) -> Tensor:
        """What the sum is; `fuses` if the maps are of different levels."""
        return total

    def made(self, name: str, output: Tensor) -> Tensor:
        """What a normalization or an activation returns."""
        return output

    def left(self, output: Any) -> Any:
        """What a part of the network returns that is left alone; None for what it is."""
        return None

    def result(self, name: str, inputs: Sequence[Note], note: Note, output: Tensor) -> Note:
        """The note of a result, told anything more."""
        return note

    # -- the forward pass ------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[Observer]:
        """The observer in action, with the names of the running modules at hand."""
        enter = module_hooks.register_module_forward_pre_hook(self._enter)
        leave = module_hooks.register_module_forward_hook(self._leave, always_call=True)
        try:
            with self:
                yield self
        finally:
            enter.remove()
            leave.remove()
            self._stack.clear()
            self._notes.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self.names.get(id(module), self.module)
        self._stack.append((name, weakref.ref(args[0]) if _is_tensor(args) else None))
        if isinstance(module, torch.jit.ScriptModule):
            takes = any(self.note(tensor).joins for tensor in ops.tensors_in(args))
            self.remarks.script(self.module, module, takes)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        inside = self._stack and self._stack.pop()[0] in self.encoder
        return self.left(output) if inside and self.module not in self.encoder else None

    @property
    def module(self) -> str:
        """Name of the innermost known module that is running."""
        return self._stack[-1][0] if self._stack else ""

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
        args, kwargs = steadied(name, args, kwargs, self.log)
        if name in ops.CONCATENATIONS or name in ops.STACKS:
            return self._joined(name, func, args, kwargs)
        if name in ops.WRITES:
            return self._written(name, func, args, kwargs)
        if name == "add" and ops.adds_two_maps(args, kwargs):
            return self._added(func, args, kwargs)
        return self._other(name, func, args, kwargs)

    def _other(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        inputs = ops.tensors_in((*args, kwargs) if kwargs else args)
        notes = [self.note(tensor) for tensor in inputs]  # before it changes them in place
        result = func(*args, **kwargs)
        if name in ops.SOURCES and all(result is not tensor for tensor in inputs):
            result = self.made(name, result)
        outputs = ops.tensors_in(result)
        if not outputs:
            return result
        self.remarks.use(self.module, name, inputs, outputs)
        pairs = list(zip(inputs, notes, strict=True))
        for output in outputs:
            note = follow(func, name, self.module, args, kwargs, pairs, output)
            self._remember(name, func, pairs, note, output)
        self.remarks.norm(self.module, name, notes)
        return result

    def _remember(
        self,
        name: str,
        func: Any,
        pairs: Sequence[tuple[Tensor, Note]],
        note: Note,
        output: Tensor,
    ) -> None:
        notes = [each for _, each in pairs]
        note = note.but(levels=self._levels_of(name, notes))
        if not pairs:
            constant = bool(self._stack) and name not in ops.RANDOM
            note = note.but(constant=constant)
        if name in ops.REDUCTIONS:
            self.remarks.reduction(self.module, notes)
        if name in ops.SUMS:
            self.remarks.addition(self.module, pairs, output)
        if note.joins and output.dtype != torch.bool:
            blocked = note.blocked
            note = self.result(name, notes, note, output)
            if note.blocked and not blocked:
                self.remarks.loss(self.module, name, func, pairs, output)
        self._know(output, note)

    def note(self, tensor: Tensor) -> Note:
        """What is known of a tensor."""
        found = self._notes.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return _CONSTANT if id(tensor) in self.constants else _UNKNOWN
        note = found[1]
        if note.in_encoder and self.module not in self.encoder:
            return note.but(joins=NONE, depth=0, joined=None, blocked="", in_encoder=False)
        return note

    def _know(self, tensor: Tensor, note: Note) -> None:
        key, inside = id(tensor), self.module in self.encoder
        if inside != note.in_encoder:
            note = note.but(in_encoder=inside)
        forget = weakref.ref(tensor, lambda _: self._notes.pop(key, None))
        self._notes[key] = (forget, note)

    # -- joins -----------------------------------------------------------------------------

    def _joined(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        tensors = list(ops.argument(args, kwargs, 0, "tensors"))
        dim = ops.join_dim(name, args, kwargs)
        self.log.seen.append(
            f"{name}(dim={dim}) of {', '.join(str(tuple(t.shape)) for t in tensors)} "
            f"in {self.module or 'the model'}"
        )
        notes = [self.note(tensor) for tensor in tensors]
        stacked = name in ops.STACKS
        filled = [i for i, tensor in enumerate(tensors) if tensor.numel()]
        constant = all(note.constant for note in notes)
        number = None
        if len(filled) > 1 and not constant:
            rank = tensors[filled[0]].dim() + stacked
            widths = [1 if stacked else t.shape[dim] if t.dim() else 0 for t in tensors]
            join = self._new_join(dim % max(rank, 1), rank, widths, notes)
            number = join.number
            if not join.in_encoder:
                for i, values in ops.as_numbers(tensors, filled):
                    tensors[i] = self.join(join, i, values)
                args, kwargs = ops.replaced(args, kwargs, 0, "tensors", tensors)
        result = func(*args, **kwargs)
        if len(filled) == 1 and not stacked:
            note = notes[filled[0]]
        else:
            note = Note(
                self.module,
                constant=constant,
                upstream=union([note.upstream for note in notes]),
                joins=union([note.joins for note in notes] + [_one(number)]),
                depth=max(note.depth for note in notes) + (number is not None),
                joined=number,
                levels=self._levels_of(name, notes),
            )
        self._know(result, note)
        return result

    def _new_join(self, dim: int, rank: int, widths: Sequence[int], notes: Sequence[Note]) -> Join:
        depth, inside = max(note.depth for note in notes), self.module in self.encoder
        number, sides = len(self.log.joins), tuple(widths)
        join = Join(number, self.module, dim, sides, tuple(notes), depth, inside, rank)
        self.log.joins.append(join)
        return join

    def _written(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        index, keyword = ops.WRITES[name]
        value: Any = ops.argument(args, kwargs, index, keyword)
        target: Any = args[0] if args else None
        if not self._is_partial(value, target):
            return self._other(name, func, args, kwargs)
        made, before = self.note(value), self.note(target)
        join = self._new_join(-1, 0, (value.shape[0] if value.dim() else 1,), [made])
        args, kwargs = ops.replaced(args, kwargs, index, keyword, self.join(join, 0, value))
        base = target._base
        result = func(*args, **kwargs)
        for tensor in (target, base, result):
            if isinstance(tensor, Tensor):
                known = before if tensor is target else self.note(tensor)
                self._know(tensor, with_writing(known, made, join, self.module))
        return result

    def _is_partial(self, value: Any, target: Any) -> bool:
        """Whether a map is written into a part of another."""
        if not ops.fills_a_part(value, target) or self.module in self.encoder:
            return False
        return not self.note(value).constant and bool(value.is_floating_point())

    # -- linear layers ---------------------------------------------------------------------

    def _linear(self, name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        values = ops.argument(args, kwargs, 0, "input")
        weight = ops.argument(args, kwargs, 1, "weight")
        note = self.note(values)
        reference = self._stack[-1][1] if self._stack else None
        made_by = (next(self._calls), self._key(weight, name), self.module, name)
        call = Call(*made_by, func, args, kwargs, note, values.dim(), reference and reference())
        self.remarks.use(call.module, call.kind, [call.input], [call.input])
        result = self.consume(call)
        if result is None:
            result = func(*args, **kwargs)
        upstream = note.upstream | {call.key} if note.joins else note.upstream
        levels = note.levels
        if self.module in self.encoder:
            levels = frozenset((next(self._levels),))
        elif name in ops.TRANSPOSED:
            levels |= {next(self._levels)}
        made = Note(self.module, constant=note.constant, upstream=upstream, levels=levels)
        self._know(result, made.but(follows=call.key))
        return result

    def _key(self, weight: Tensor, kind: str) -> int:
        """The weight's identity; a computed weight's is where it is used, as a negative number."""
        if id(weight) in self.parameters:
            return id(weight)
        if self.module in self.reparametrized:
            return self.reparametrized[self.module]
        return self._computed.setdefault((self.module, kind), -1 - len(self._computed))

    def _added(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        numbers = self._sums.setdefault(self.module, itertools.count())
        location = (self.module, next(numbers))
        first, second = self.adding(location, (args[0], args[1]))
        known = len(self.log.sums)
        for old, new in ((args[0], first), (args[1], second)):
            if new is not old:
                self._know(new, self.note(old))
        result = self._other("add", func, (first, second, *args[2:]), kwargs)
        total = self.added(location, (first, second), result, len(self.log.sums) > known)
        note = self.note(result)
        if result is first and total is not args[0]:  # in place: whoever holds it has to see it
            args[0].copy_(total)
            total = args[0]
        if total is not result:
            self._know(total, note)
        return total

    def _levels_of(self, name: str, notes: Sequence[Note]) -> frozenset[int]:
        if self.module in self.encoder:
            return frozenset((next(self._levels),))
        if name in ops.FACTORIES:
            return NONE
        levels = union([note.levels for note in notes])
        return levels | {next(self._levels)} if name in ops.RESIZES else levels


_UNKNOWN, _CONSTANT = Note(), Note(constant=True)


def _one(number: int | None) -> frozenset[int]:
    return NONE if number is None else frozenset((number,))


def _is_tensor(args: Any) -> bool:
    return bool(args) and isinstance(args[0], Tensor)
