"""A model as it should be while it is watched, and exactly as it was afterwards."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .framework_internals import silent_logging
from .snapshots import as_before, same_random_streams

__all__ = ["calibrating", "same_random_streams"]

# Modules that drop something at random, by class name: PyTorch's own and those of timm,
# torchvision and Transformers (DropPath, StochasticDepth, SwinDropPath, DropBlock2d, ...).
_RANDOM = re.compile(r"drop_?(out|path|block|connect)|stochastic_?depth", re.IGNORECASE)


@contextmanager
def calibrating(model: nn.Module, training: bool = True) -> Iterator[None]:
    """Modes as training will have them, dropout and drop path off, eager, without gradients.

    A model in train mode is measured as it is: normalization layers that are kept in eval mode are
    measured in eval mode. A model in eval mode is put into train mode by its own ``train()``, as a
    training loop does, but for frozen layers (in eval mode, nothing in them trained).

    Train mode, because at initialization the running statistics are 0 and 1 and eval mode would
    make every normalization the identity (the paper's Eqs. 6 and 7 would not hold).
    With `training` false the whole model is in eval mode instead, by its own ``eval()``.
    On leaving, also by an exception, every train flag, buffer, attribute and random stream is as
    before, and so is whatever else `snapshots.as_before` can restore.
    """
    with ExitStack() as stack:
        stack.enter_context(as_before(model))
        stack.enter_context(_same_flags(model))
        stack.enter_context(_same_members(model))
        stack.enter_context(same_random_streams())
        stack.enter_context(silent_logging(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager())
        frozen = [module for module in model.modules() if _is_frozen(module)]
        if not training or not model.training:
            model.train(training)
        for module in (*frozen, *filter(_is_random, model.modules())):
            module.training = False
        yield


def norms_in_eval(model: nn.Module) -> list[str]:
    """Names of the layers with running statistics that are not in train mode."""
    return [
        name
        for name, module in model.named_modules()
        if not module.training and isinstance(getattr(module, "running_mean", None), Tensor)
    ]


def _is_random(module: nn.Module) -> bool:
    """By its name; since networks may be named after dropout, only if it has nothing to train."""
    named = _RANDOM.search(type(module).__name__) is not None
    return named and next(module.parameters(), None) is None


def _is_frozen(module: nn.Module) -> bool:
    """In eval mode with parameters that are not trained: it will stay so during training."""
    parameters = list(module.parameters())
    return not module.training and bool(parameters) and not any(p.requires_grad for p in parameters)


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled modules as they are written; they warn about global hooks."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*global hooks on modules", category=UserWarning)
        yield


@contextmanager
def _same_flags(model: nn.Module) -> Iterator[None]:
    """Train flags, and which parameters are trained: a `train()` of the model may change both."""
    flags = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        for parameter, flag in trained:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def _same_members(model: nn.Module) -> Iterator[None]:
    """Values of all buffers, and what is registered under which name, as before."""
    registries: list[tuple[Any, dict[Any, Any]]] = [
        (registry, dict(registry))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # its members cannot be exchanged
        for registry in (module._buffers, module._parameters, module._modules, *_hooks(module))
    ]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for registry, before in registries:
            if not _same_objects(registry, before):
                registry.clear()
                registry.update(before)
        with torch.no_grad():
            for buffer, value in values:
                if buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer.data = value  # an observer of quantization grows its statistics
                elif not torch.equal(buffer, value):  # an expanded buffer cannot be written to
                    buffer.copy_(value)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Tables of hooks: what a first forward pass registers would else be registered twice.

    Transformers notes in an attribute, which is set back, that its hooks are there.
    """
    endings = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
    tables = (value for name, value in vars(module).items() if name.endswith(endings))
    return (table for table in tables if isinstance(table, dict))


def _same_objects(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return list(a) == list(b) and all(a[name] is b[name] for name in b)
