"""Run a network's forward pass with lazy resizing, in the situations it was checked in.

The module gets a subclass of its class, as `torch.nn.utils.parametrize` and FSDP do it, whose
forward pass is the class's own within `LazyResizing`. So copies, shallow ones included, run their
own modules, and pickles hold the original class.

A situation is which modules are in training mode and which hooks they have. In one that was not
checked, the network runs as it was, with a warning.
"""

from __future__ import annotations

import copyreg
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seglab.operators.lazy_mode import LazyResizing
from seglab.operators.lazy_tensor import finish
from seglab.operators.observers import requires_plain_operators
from seglab.torch_internals import hooks_of, hooks_of_all_modules

Situation = tuple[tuple[Any, ...], ...]
ATTRIBUTE = "_accelerations"
"""Where a network keeps its `Settings`; the last of several counts."""


@dataclass
class Settings:
    """How a network's forward pass is accelerated.

    Attributes:
        force: as for `accelerate`.
        eager: numbers of the resizing calls that are computed at once.
        situations: in which it was checked; None for all.
        layers: names of the convolutions fused in the last pass, and how many of their branches.
    """

    force: str | None
    eager: frozenset[int] = frozenset()
    situations: frozenset[Situation] | None = None
    layers: dict[str, int] | None = None
    has_warned: bool = False


def situation(model: nn.Module) -> Situation:
    """Training flag and hooks of every module, and hooks of all modules."""
    return (
        tuple(map(_functions, hooks_of_all_modules())),
        *map(_situation_of_one, model.modules()),
    )


def _situation_of_one(module: nn.Module) -> tuple[Any, ...]:
    hooks = hooks_of(module)
    return (module.training, *map(_functions, hooks)) if any(hooks) else (module.training,)


def _functions(hooks: Mapping[int, Any]) -> tuple[str, ...]:
    """Where each hook's function is defined.

    Not the number it is registered under: a network may register hooks of its own in its first
    forward pass (transformers does), so that the copy that was checked has other numbers.
    """
    return tuple(map(_definition, hooks.values()))


def _definition(hook: Any) -> str:
    if isinstance(hook, functools.partial):
        return f"partial({_definition(hook.func)})"
    function = getattr(hook, "__func__", hook)
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(hook).__module__}.{type(hook).__qualname__}"
    return f"{function.__module__}.{function.__qualname__}:{code.co_firstlineno}"


def install(model: nn.Module, settings: Settings) -> Callable[[], None]:
    """Accelerate a network; returns what undoes that, whatever was installed since."""
    if "forward" in vars(model):
        raise TypeError(
            f"something replaced the method `forward` of this {type(model).__name__}: accelerate"
            " it before that"
        )
    if ATTRIBUTE not in vars(model):
        kind: Any = type(model)
        model.__class__ = _accelerated_class(kind)
    vars(model)[ATTRIBUTE] = [*vars(model).get(ATTRIBUTE, []), settings]
    return functools.partial(_remove, model, settings)


def _remove(model: nn.Module, settings: Settings) -> None:
    rest = [x for x in vars(model).get(ATTRIBUTE, []) if x is not settings]
    if rest:
        vars(model)[ATTRIBUTE] = rest
    else:
        remove_all(model)


def remove_all(model: nn.Module) -> None:
    """Let a network run as its class does."""
    if vars(model).pop(ATTRIBUTE, None) is not None:
        model.__class__ = type(model).__mro__[1]


@functools.cache
def _accelerated_class(base: type[nn.Module]) -> type[nn.Module]:
    class Accelerated(base):  # type: ignore[misc, valid-type]  # a class known at run time
        @functools.wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return _run(self, super().forward, args, kwargs)

        def __reduce_ex__(self, protocol: Any) -> Any:
            reduced = super().__reduce_ex__(protocol)
            if reduced[:2] != (copyreg.__newobj__, (type(self),)):  # type: ignore[attr-defined]
                return reduced
            return _new, (base,), *reduced[2:]

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(Accelerated, name, getattr(base, name))
    return Accelerated


def _new(base: type[nn.Module]) -> nn.Module:
    kind: Any = base
    accelerated = _accelerated_class(kind)
    return accelerated.__new__(accelerated)


def _run(model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or requires_plain_operators(*model.parameters()):
        return forward(*args, **kwargs)
    settings: Settings = vars(model)[ATTRIBUTE][-1]
    if settings.situations is not None and situation(model) not in settings.situations:
        _warn_once(model, settings)
        return forward(*args, **kwargs)
    with LazyResizing(settings.force, settings.eager) as mode:
        output = finish(forward(*args, **kwargs))
    if settings.layers is not None and mode.fused:
        names = {id(x): name.rpartition(".")[0] for name, x in model.named_parameters()}
        settings.layers.update((names.get(id(x), "?"), n) for x, n in mode.fused)
    return output


def _warn_once(model: nn.Module, settings: Settings) -> None:
    if not settings.has_warned:
        settings.has_warned = True
        warnings.warn(
            f"this {type(model).__name__} was accelerated with other hooks or other modules in"
            " training mode than it has now: it runs as it was. Call `accelerate` again to check"
            " it as it is used now",
            stacklevel=5,
        )
