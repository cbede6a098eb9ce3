"""Compare a network's passes as it is and accelerated: outputs, gradients and buffers by name.

Each pass runs on a copy of its own, from the same random state. What differs in the network's own
precision is decided in float64: there, a difference is an error unless it is as small as the
rounding that a change of the parameters' last bits makes in the same tensor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from seglab.operators.accelerated import Settings, install
from seglab.operators.nested import replace_tensors

Flags = tuple[bool, ...]
Results = dict[str, Tensor]
Call = Callable[[nn.Module], Any]

ROUNDING_OF_DOUBLES = 1e-8
NOISE_FACTOR = 1e3  # two samples of rounding noise in a tensor hardly differ by more


def training_flags(model: nn.Module) -> list[Flags]:
    """Which modules are in training mode: as it is, after `train()` and after `eval()`."""
    flags = [_flags(model)]
    for switch in ("train", "eval"):
        switched = copy.deepcopy(model)
        getattr(switched, switch)()
        flags.append(_flags(switched))
    return list(dict.fromkeys(flags))


def _flags(model: nn.Module) -> Flags:
    return tuple(module.training for module in model.modules())


def set_flags(model: nn.Module, flags: Flags) -> nn.Module:
    """Put each module into training or evaluation mode."""
    for module, flag in zip(model.modules(), flags, strict=True):
        module.training = flag
    return model


def run_pass(
    model: nn.Module, call: Call, flags: Flags, settings: Settings | None = None
) -> Results:
    """Outputs, gradients and buffers of a forward and backward pass, by name.

    Args:
        model: left untouched: the pass runs on a copy.
        call: calls it with the example.
        flags: of `training_flags`.
        settings: of the acceleration, or None to run it as it is.
    """
    model = set_flags(copy.deepcopy(model), flags)
    if settings is not None:
        install(model, settings)
    model.zero_grad()
    with torch.enable_grad(), forked_random_state(model):
        torch.manual_seed(0)
        outputs = floating_tensors(call(model))
        loss = _loss(outputs)
        if loss.requires_grad:
            torch.autograd.backward(loss)
    results = {f"output {index}": x.detach() for index, x in enumerate(outputs)}
    gradients = ((n, x.grad) for n, x in model.named_parameters() if x.grad is not None)
    results |= {f"gradient of {name}": x.clone() for name, x in gradients}
    buffers = ((n, x) for n, x in model.named_buffers() if x.is_floating_point())
    return results | {f"buffer {name}": x.clone() for name, x in buffers}


def forked_random_state(model: nn.Module) -> AbstractContextManager[None]:
    """Restores the random state of the CPU and of the network's devices."""
    devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
    return torch.random.fork_rng(list(devices))


def _loss(outputs: list[Tensor]) -> Tensor:
    """Means of the outputs, weighted at random: no gradient vanishes by symmetry."""
    total = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        generator = torch.Generator().manual_seed(x.numel())
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        total = total.to(x.device) + (x * weight).mean().double()
    return total


def floating_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors anywhere in a network's output."""
    found: list[Tensor] = []

    def collect(x: Tensor) -> Tensor:
        if x.is_floating_point():
            found.append(x)
        return x

    replace_tensors(output, collect, in_place=False)
    return found


def doubtful(found: Results, expected: Results, tolerance: float) -> dict[str, float]:
    """Tensors that differ by more than a tolerance, relative to their own largest value."""
    names = dict.fromkeys([*expected, *found])
    errors = {name: _relative(found.get(name), expected.get(name)) for name in names}
    return {name: error for name, error in errors.items() if not error <= tolerance}


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    """Infinite if only one of the two exists, or either has a value that is not finite."""
    if found is None or expected is None or found.shape != expected.shape:
        return math.inf
    error, scale = _largest(found - expected), _largest(expected)
    if not (math.isfinite(error) and math.isfinite(scale)):
        return math.inf  # a quotient that is not a number would be lost among others
    return error / scale if scale else math.inf if error else 0.0


def _largest(x: Tensor) -> float:
    largest = float(x.detach().abs().max()) if x.numel() else 0.0
    return math.inf if math.isnan(largest) else largest


def overall_error(found: Results, expected: Results) -> float:
    """Relative difference of each output, and of all gradients taken together."""
    outputs = [name for name in expected if name.startswith("output")]
    gradients = [name for name in expected if name.startswith("gradient")]
    errors = [_relative(found.get(name), expected[name]) for name in outputs]
    if gradients:
        errors.append(_relative(_joined(found, gradients), _joined(expected, gradients)))
    return max(errors, default=0.0)


def _joined(results: Results, names: Iterable[str]) -> Tensor:
    return torch.cat([results[name].flatten() for name in names])


def errors_in_double(
    model: nn.Module, example: Any, flags: Flags, settings: Settings
) -> dict[str, float]:
    """Tensors that differ in float64 by more than rounding.

    Args:
        model: left untouched.
        example: its input, cast as the model is.
        flags: of `training_flags`.
        settings: of the acceleration.
    """
    exact = copy.deepcopy(model).double()
    call = caller(replace_tensors(example, _doubled, in_place=False))
    expected = run_pass(exact, call, flags)
    found = run_pass(exact, call, flags, settings)
    wrong = doubtful(found, expected, ROUNDING_OF_DOUBLES)
    if not wrong:
        return {}
    nudged = run_pass(_nudged(exact), call, flags)
    noise = {name: _largest(nudged[name] - x) for name, x in expected.items() if name in nudged}
    return {
        name: error
        for name, error in wrong.items()
        if not _is_noise(found.get(name), expected.get(name), NOISE_FACTOR * noise.get(name, 0.0))
    }


def _doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _nudged(model: nn.Module) -> nn.Module:
    """Change the last bits of the parameters."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            nudge = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            x.mul_(1 + 2**-50 * nudge)
    return model


def _is_noise(found: Tensor | None, expected: Tensor | None, noise: float) -> bool:
    if found is None or expected is None or found.shape != expected.shape:
        return False
    return _largest(found - expected) <= noise < math.inf


def caller(example: Any) -> Call:
    """What calls a network with a tensor, a tuple of arguments or a mapping of keywords."""
    if isinstance(example, Mapping):
        return lambda model: model(**example)
    if isinstance(example, tuple):
        return lambda model: model(*example)
    return lambda model: model(example)
