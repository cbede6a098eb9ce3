"""`accelerate`: other people's networks without upsampled and concatenated maps.

Works on any network whose decoder upsamples, concatenates and convolves (UPerNet, PSPNet,
DeepLabV3+, U-Net, SegFormer of segmentation_models_pytorch, torchvision, transformers): while its
forward pass runs, resizing and concatenating are deferred (`deferred.py`) and convolutions fused.
Modules, parameters and state-dict keys stay as they are.

Not chosen: rewriting a traced graph, which fixes shapes and control flow and fails on most
third-party code. Given up: under `torch.compile`, export, and while something else watches the
network's functions, it runs as it was.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seglab.operators.deferred import Deferred, Deferring, made
from seglab.operators.observers import needs_ordinary_operations

ROUNDING_OF_DOUBLES = 1e-8


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
        error: largest difference of outputs and gradients, relative to their largest value.
        undo: call it to let the network run as it did before.
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
        model: any network; changed in place, by an attribute `forward`.
        example: its input: a tensor, a tuple of arguments or a mapping of keyword arguments. Of
            the size and on the device that matter: gains are measured on it.
        tolerance: largest difference allowed, relative to the largest value, for outputs and for
            gradients of parameters. A larger one is accepted if it is rounding that an
            ill-conditioned network has blown up: if in float64 it is below 1e-8.
        min_gain: least gain in training time for which the network is changed.
        repeats: timed passes of each kind, alternating; medians are compared.
        force: "fused" to fuse whatever can be, whether it is faster or not.

    Raises:
        CannotAccelerateError: nothing can be fused, results differ, or it is no faster.

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
    trial = copy.deepcopy(model)
    call = _caller(example)
    layers = _layers(trial, call, force)
    if not layers:
        raise CannotAccelerateError(
            "no convolution of resized branches would be faster fused: none was seen within the"
            " forward pass, or the maps are too small. force='fused' fuses all that can be"
        )
    error = _largest_error(trial, call, force)
    if not error <= tolerance and not _is_rounding(trial, example, force):
        raise CannotAccelerateError(
            f"results would differ by {error:.1e} of their largest value, more than"
            f" tolerance={tolerance}, and not by rounding alone:"
            f" {[layer.name for layer in layers]}"
        )
    forward, training = _gains(trial, call, repeats, force)
    if training < min_gain:
        raise CannotAccelerateError(
            f"training would be {training:.2f} times as fast (inference {forward:.2f}), less than"
            f" min_gain={min_gain}: the convolutions are too small a part, or the maps too small"
        )
    return Acceleration(layers, forward, training, error, _install(model, force))


Call = Callable[[nn.Module], Any]


def _caller(example: Any) -> Call:
    if isinstance(example, Mapping):
        return lambda model: model(**example)
    if isinstance(example, tuple):
        return lambda model: model(*example)
    return lambda model: model(example)


def _install(model: nn.Module, force: str | None) -> Callable[[], None]:
    """Make promises within the forward pass, kept by its end; returns what undoes that."""
    own = vars(model).get("forward")
    model.forward = partial(_deferring, model.forward, model, force)

    def undo() -> None:
        if own is None:
            vars(model).pop("forward", None)
        else:
            model.forward = own

    return undo


def _deferring(
    forward: Callable[..., Any], model: nn.Module, force: str | None, *args: Any, **kwargs: Any
) -> Any:
    compiling = torch.compiler.is_compiling()
    if compiling or any(needs_ordinary_operations(x) for x in model.parameters()):
        return forward(*args, **kwargs)
    with Deferring(force):
        output = forward(*args, **kwargs)
    return made(output)


def _layers(model: nn.Module, call: Call, force: str | None) -> tuple[FusedLayer, ...]:
    names = {id(x): name.rpartition(".")[0] for name, x in model.named_parameters()}
    with torch.no_grad(), Deferring(force) as mode:
        call(model.eval())
    return tuple(FusedLayer(names.get(id(x), "?"), n) for x, n in mode.fused)


def _largest_error(model: nn.Module, call: Call, force: str | None) -> float:
    plain = _results(model, call)
    undo = _install(model, force)
    try:
        fused = _results(model, call)
    finally:
        undo()
    return _largest(map(_difference, fused, plain))


def _is_rounding(model: nn.Module, example: Any, force: str | None) -> bool:
    """Whether the difference vanishes in double precision; False if the network cannot do that."""
    try:
        exact = copy.deepcopy(model).double()
        return _largest_error(exact, _caller(_doubled(example)), force) < ROUNDING_OF_DOUBLES
    except (RuntimeError, TypeError, ValueError):  # a cast to float32 within the network
        return False


def _doubled(example: Any) -> Any:
    if isinstance(example, Tensor):
        return example.double() if example.is_floating_point() else example
    if isinstance(example, Mapping):
        return {name: _doubled(value) for name, value in example.items()}
    return tuple(map(_doubled, example)) if isinstance(example, tuple) else example


def _results(model: nn.Module, call: Call) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs in evaluation, which has no randomness, and the gradients of their mean squares."""
    model.eval().zero_grad()
    outputs = _tensors(call(model))
    torch.autograd.backward(_loss(outputs))
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    return [x.detach() for x in outputs], [x.clone() for x in gradients]


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, each tensor's relative to its largest value.

    Some gradients are zero but for rounding (of a bias that a softmax or a norm removes): values
    below a thousandth of the largest of all tensors count as that much.
    """
    largest = [float(x.abs().max()) for x in expected if x.numel()]
    floor = max(1e-3 * max(largest, default=0.0), torch.finfo(torch.float32).tiny)
    pairs = [(x, y) for x, y in zip(found, expected, strict=True) if y.numel()]
    errors = [float((x - y).abs().max()) for x, y in pairs]
    return _largest(e / max(top, floor) for e, top in zip(errors, largest, strict=True))


def _largest(errors: Iterable[float]) -> float:
    """The largest; infinite if one is NaN, which `max` would drop."""
    return max((math.inf if math.isnan(e) else e for e in errors), default=0.0)


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors anywhere in a network's output."""
    if isinstance(output, Deferred):
        output = output.make()
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    parts = output if isinstance(output, list | tuple) else []
    return [x for part in parts for x in _tensors(part)]


def _loss(outputs: list[Tensor]) -> Tensor:
    return torch.stack([x.square().mean() for x in outputs]).sum()


def _gains(model: nn.Module, call: Call, repeats: int, force: str | None) -> tuple[float, float]:
    """Time before over time after, of inference and of a training pass."""

    def infer() -> None:
        with torch.no_grad():
            call(model.eval())

    def train() -> None:
        torch.autograd.backward(_loss(_tensors(call(model.train()))))

    return _gain(infer, model, repeats, force), _gain(train, model, repeats, force)


def _gain(step: Callable[[], None], model: nn.Module, repeats: int, force: str | None) -> float:
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * repeats + 2):
        fused = turn % 2 == 1
        undo = _install(model, force) if fused else None
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
