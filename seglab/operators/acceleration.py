"""`accelerate`: other people's networks without upsampled and concatenated maps.

Works on any network whose decoder upsamples, concatenates and convolves (UPerNet, PSPNet,
DeepLabV3+, U-Net, SegFormer of segmentation_models_pytorch, torchvision, transformers): while its
forward pass runs, resizing and concatenating are lazy (`lazy_mode.py`) and convolutions fused.
Modules, parameters and state-dict keys stay as they are. Everything is tried on a copy first:
outputs, gradients and buffers by name, in training and in evaluation.

Not chosen: rewriting a traced graph, which fixes shapes and control flow and fails on most
third-party code. Given up: under `torch.compile`, export, while something else watches the
network's functions, and with hooks or training flags that were not checked, it runs as it was.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from seglab.operators.accelerated import Settings, install, remove_all, situation
from seglab.operators.comparison import (
    Call,
    Flags,
    Results,
    caller,
    doubtful,
    errors_in_double,
    floating_tensors,
    forked_random_state,
    overall_error,
    run_pass,
    set_flags,
    training_flags,
)
from seglab.operators.fusion_conv import FusionConv2d
from seglab.operators.lazy_tensor import LazyTensorError


class CannotAccelerateError(RuntimeError):
    """The network was left as it was; the message says why."""


@dataclass(frozen=True)
class FusedLayer:
    """A convolution that reads branches at their own resolution.

    Attributes:
        name: full name of the module.
        n_branches: how many of its branches were not resized.
    """

    name: str
    n_branches: int


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did.

    Attributes:
        layers: convolutions that are fused for inputs like the example.
        forward_gain: time of the forward pass without gradients before, over after.
        training_gain: the same for forward and backward pass.
        error: largest difference of an output, or of all gradients together, relative to the
            largest value.
        undo: call it to let the network run as it did before; several in any order.
    """

    layers: tuple[FusedLayer, ...]
    forward_gain: float
    training_gain: float
    error: float
    undo: Callable[[], None] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"  {layer.name}: {layer.n_branches} branches" for layer in self.layers]
        gains = f"forward x{self.forward_gain:.2f}, training x{self.training_gain:.2f}"
        return "\n".join([f"{gains}, differs by {self.error:.1e}", *lines])


def accelerate(
    model: nn.Module,
    example: Any,
    *,
    tolerance: float = 1e-4,
    min_gain: float = 1.02,
    repeats: int = 5,
    force: str | None = None,
) -> Acceleration:
    """Make a network compute fusions at the branches' own resolutions, if that is safe and faster.

    Args:
        model: any network; changed in place: it gets a subclass of its class.
        example: its input: a tensor, a tuple of arguments or a mapping of keyword arguments. Of
            the size and on the device that matter: gains are measured on it.
        tolerance: largest difference allowed in each output, gradient and buffer, relative to its
            own largest value. A larger one is accepted if float64 shows it to be rounding.
        min_gain: least gain in training time for which the network is changed.
        repeats: timed passes of each kind, alternating; medians are compared.
        force: "fused" to fuse whatever can be, whether it is faster or not.

    Hooks that it has are called during the trial, on a copy, and are part of what is checked. What
    a hook's function keeps outside of the network (a closure, a global) is no part of the copy: it
    sees the passes of the trial.
    With hooks added later, or modules switched between training and evaluation otherwise than by
    `train()` and `eval()`, it runs as it was, with a warning: call `accelerate` again.

    Raises:
        CannotAccelerateError: nothing can be fused, results differ, it is no faster, or the trial
            failed, whatever the reason. The network is as it was.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fuse = nn.Conv2d(6, 4, 3, padding=1)
    ...     def forward(self, x):
    ...         up = nn.functional.interpolate(x[:, :, ::2, ::2], size=x.shape[2:], mode="bilinear")
    ...         return self.fuse(torch.cat([x, up], dim=1))
    >>> done = accelerate(Net(), torch.rand(1, 3, 16, 16), force="fused", min_gain=0)
    >>> done.layers
    (FusedLayer(name='fuse', n_branches=1),)
    """
    try:
        return _accelerate(model, example, tolerance, min_gain, repeats, force)
    except CannotAccelerateError:
        raise
    except Exception as error:
        raise CannotAccelerateError(
            f"the trial on a copy failed with {type(error).__name__}: {error}"
        ) from error


def _accelerate(
    model: nn.Module,
    example: Any,
    tolerance: float,
    min_gain: float,
    repeats: int,
    force: str | None,
) -> Acceleration:
    new = copy.deepcopy(model)
    remove_all(new)
    trial = _with_hooks_of_first_use(new, example)
    flags = training_flags(trial)
    checked = frozenset(situation(set_flags(x, each)) for x in (new, trial) for each in flags)
    settings = Settings(force, situations=checked, layers={})
    error = _check(trial, example, flags, settings, tolerance)
    layers = tuple(FusedLayer(name, n) for name, n in (settings.layers or {}).items())
    settings = replace(settings, layers=None)
    forward, training = _gains(trial, caller(example), repeats, settings)
    if not training >= min_gain:
        raise CannotAccelerateError(
            f"training would be {training:.2f} times as fast (inference {forward:.2f}), less than"
            f" min_gain={min_gain}: the convolutions are too small a part, or the maps too small"
        )
    return Acceleration(layers, forward, training, error, install(model, settings))


def _with_hooks_of_first_use(model: nn.Module, example: Any) -> nn.Module:
    """The network, or a used copy if its first forward pass registers hooks."""
    used = copy.deepcopy(model)
    with torch.no_grad(), forked_random_state(model):
        caller(example)(used)
    return model if situation(used) == situation(model) else used


def _check(
    trial: nn.Module, example: Any, flags: list[Flags], settings: Settings, tolerance: float
) -> float:
    """Compare passes in every mode; returns the overall error."""
    call = caller(example)
    plain = [run_pass(trial, call, each) for each in flags]
    fused = _fused_passes(trial, call, flags, settings)
    _check_layers(trial, settings)
    for each, found, expected in zip(flags, fused, plain, strict=True):
        if wrong := doubtful(found, expected, tolerance):
            _decide_in_double(trial, example, each, settings, wrong)
    return max(map(overall_error, fused, plain))


def _fused_passes(
    trial: nn.Module, call: Call, flags: list[Flags], settings: Settings
) -> list[Results]:
    """Passes in every mode; maps that cannot be lazy are found by trying and computed at once."""
    try:
        return [run_pass(trial, call, each, settings) for each in flags]
    except LazyTensorError as error:
        if error.calls <= settings.eager:
            raise
        settings.eager |= error.calls
        settings.layers = {}
    return _fused_passes(trial, call, flags, settings)


def _check_layers(trial: nn.Module, settings: Settings) -> None:
    if not settings.layers:
        raise CannotAccelerateError(
            "no convolution of resized branches would be faster fused: none was seen within the"
            " forward pass, or the maps are too small. force='fused' fuses all that can be"
        )
    modules = dict(trial.named_modules())
    if all(isinstance(modules.get(name), FusionConv2d) for name in settings.layers):
        raise CannotAccelerateError(
            f"nothing is left to gain: {', '.join(settings.layers)} are FusionConv2d layers, which"
            " do without upsampled maps by themselves"
        )


def _decide_in_double(
    trial: nn.Module, example: Any, flags: Flags, settings: Settings, wrong: dict[str, float]
) -> None:
    """Accept differences that are rounding, refuse others."""
    name = max(wrong, key=lambda name: wrong[name])
    what = (
        f"results would differ, {name} by {wrong[name]:.1e} of its largest value and"
        f" {len(wrong) - 1} others, {'in training' if any(flags) else 'in evaluation'}"
    )
    try:
        errors = errors_in_double(trial, example, flags, settings)
    except Exception as error:
        raise CannotAccelerateError(
            f"{what}, and not by rounding alone as far as can be told: in float64 the network"
            f" fails with {type(error).__name__}: {error}"
        ) from error
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        raise CannotAccelerateError(
            f"{what}, and not by rounding alone: {worst} by {errors[worst]:.1e} in float64"
        )


def _gains(model: nn.Module, call: Call, repeats: int, settings: Settings) -> tuple[float, float]:
    """Time before over time after, of inference and of a training pass."""

    def infer() -> None:
        with torch.no_grad():
            call(model.eval())

    def train() -> None:
        loss = _loss(floating_tensors(call(model.train())))
        if loss.requires_grad:
            torch.autograd.backward(loss)

    return _gain(infer, model, repeats, settings), _gain(train, model, repeats, settings)


def _loss(outputs: list[Tensor]) -> Tensor:
    return torch.stack([x.float().square().mean() for x in outputs]).sum()


def _gain(step: Callable[[], None], model: nn.Module, repeats: int, settings: Settings) -> float:
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * repeats + 2):
        fused = turn % 2 == 1
        undo = install(model, settings) if fused else None
        start = _now(model)
        step()
        times[fused].append(_now(model) - start)
        if undo is not None:
            undo()
    plain, fast = (statistics.median(times[key][1:]) for key in (False, True))  # first: warm-up
    return plain / fast


def _now(model: nn.Module) -> float:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
