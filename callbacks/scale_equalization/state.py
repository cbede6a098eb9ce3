"""A model as it should be while it is watched, and exactly as it was afterwards."""

from __future__ import annotations

import random
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Modules that drop something at random, by class name: PyTorch's own and those of timm,
# torchvision and Transformers (DropPath, StochasticDepth, SwinDropPath, DropBlock2d, ...).
_RANDOM = re.compile(r"drop_?(out|path|block|connect)|stochastic_?depth", re.IGNORECASE)


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Norm layers in train mode, dropout and drop path off, eager, without gradients.

    Frozen layers (in eval mode, nothing in them trained) stay in eval mode, as in training.

    Train mode, because at initialization the running statistics are 0 and 1 and eval mode would
    make every normalization the identity (the paper's Eqs. 6 and 7 would not hold).
    On leaving, also by an exception, every train flag, buffer and random stream is as before.
    """
    with ExitStack() as stack:
        stack.enter_context(_same_flags(model))
        stack.enter_context(_same_buffers(model))
        stack.enter_context(same_random_streams())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eager())
        for module in model.modules():
            module.training = not _is_random(module) and not _is_frozen(module)
        yield


def _is_random(module: nn.Module) -> bool:
    return _RANDOM.search(type(module).__name__) is not None


def _is_frozen(module: nn.Module) -> bool:
    """In eval mode with parameters that are not trained: it will stay so during training."""
    parameters = list(module.parameters())
    return not module.training and bool(parameters) and not any(p.requires_grad for p in parameters)


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled modules as they are written; they warn about the tracer's global hooks."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*global hooks on modules", category=UserWarning)
        yield


@contextmanager
def _same_flags(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Values of all buffers, and which tensor is which buffer, as before."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer.copy_(value)


def _cuda_is_running() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def same_random_streams() -> Iterator[None]:
    """Python's, NumPy's, torch's and every CUDA device's random state as before."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    cpu = torch.get_rng_state()
    cuda: list[Tensor] = torch.cuda.get_rng_state_all() if _cuda_is_running() else []
    try:
        yield
    finally:
        random.setstate(python)
        if numpy_state is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
