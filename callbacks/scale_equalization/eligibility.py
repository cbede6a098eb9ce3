"""Which layers an initialization may touch: not the frozen, the trained, the equalized already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .fusion import Fusion, Refusal
from .layers import (
    ORIGIN,
    SCALED,
    is_as_left,
    is_equalized,
    layer_of,
    layers_by_name,
    trained_parameter,
)
from .report import Report

_CURE = "; force=True equalizes it all the same"


def left_alone(
    model: nn.Module, fusions: Sequence[Fusion], force: bool, trained: str = ""
) -> list[Refusal]:
    """The layers that are not to be changed, each with the reason.

    `force` takes trained and equalized layers; frozen ones stay as they are in any case. `trained`
    says how it is known that all of them were trained, if it is.
    """
    known = f"it was trained before ({trained}){_CURE}" if trained and not force else ""
    reasons = [(fusion.name, _reason(model, fusion, force) or known) for fusion in fusions]
    return [Refusal(name, reason) for name, reason in reasons if reason]


def _reason(model: nn.Module, fusion: Fusion, force: bool) -> str:
    layer = layer_of(model, fusion)
    if not trained_parameter(layer, fusion.parameter).requires_grad:
        return "its weight is frozen (requires_grad=False)"
    if force:
        return ""
    if counts_as_equalized(layer, fusion):
        return f"it is equalized already{_CURE}"
    trained = _trained(model, fusion.follower)
    return f"it was trained before ({trained} is no longer constant){_CURE}" if trained else ""


def counts_as_equalized(layer: nn.Module, fusion: Fusion) -> bool:
    """Whether a layer was equalized and still shows it: weights may since have been set back.

    They were, if they are to the bit those before; or if their slices are alike in size, as freshly
    drawn ones are, although the scales were far apart.
    """
    if not is_equalized(layer) or hasattr(layer, SCALED):
        return is_equalized(layer)
    scales = [s for s in getattr(layer, ORIGIN, ((), ()))[1] if s > 0.0]
    if len(scales) < 2 or is_as_left(layer):
        return True
    weight = trained_parameter(layer, fusion.parameter)
    sizes, errors = zip(*(_size(part) for part in _slices(weight, fusion)), strict=True)
    doubt = 4.0 * max(errors) * 2**0.5
    drawn_alike = min(sizes) > 0.0 and max(sizes) / min(sizes) < 1.05 + doubt
    return not (drawn_alike and max(scales) / min(scales) > (1.1 + doubt) * (1.05 + doubt))


def _trained(model: nn.Module, norm: str) -> str:
    """The parameter of the normalization behind a layer that training has moved; "" for none.

    At initialization these are constants, mostly 1 and 0, and any training step moves no two
    alike. Some networks draw the weights at random, around one or around zero, and leave the biases
    and the running statistics where they start: that is no training.
    """
    module = layers_by_name(model).get(norm) if norm else None
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    if isinstance(weight, Tensor) and _varies(weight):
        return f"{norm}.weight" if _is_off_zero(weight) and _moved(module, bias) else ""
    if isinstance(bias, Tensor):
        return f"{norm}.bias" if _varies(bias) else ""
    means = getattr(module, "running_mean", None)  # all that a norm without parameters has
    moved = weight is None and isinstance(means, Tensor) and _varies(means)
    return f"{norm}.running_mean" if moved else ""


def _is_off_zero(values: Tensor) -> bool:
    values = values.detach().double()
    return bool(values.mean().abs() > 5 * values.std() / values.numel() ** 0.5)


def _moved(norm: nn.Module | None, bias: object) -> bool:
    """Whether what a norm never draws at random has moved; true if it has nothing of the kind."""
    means = getattr(norm, "running_mean", None)
    moving = [values for values in (bias, means) if isinstance(values, Tensor)]
    return not moving or any(_varies(values) for values in moving)


def _varies(values: Tensor) -> bool:
    return values.numel() > 1 and not bool((values == values.flatten()[0]).all())


def already_equalized(model: nn.Module, report: Report) -> list[Refusal]:
    """The layers whose weights show that they were equalized before they were loaded."""
    found = []
    for fusion, measures in zip(report.fusions, report.measures, strict=True):
        weight = trained_parameter(layer_of(model, fusion), fusion.parameter)
        if looks_equalized(weight, fusion, [measure.std for measure in measures]):
            reason = (
                "the slices of its weight are in proportion to the branches already: it comes from "
                f"an equalized network{_CURE}"
            )
            found.append(Refusal(fusion.name, reason))
    return found


def looks_equalized(weight: Tensor, fusion: Fusion, stds: Sequence[float]) -> bool:
    """Whether the slices of a weight differ in size as equalizing makes them, and not by chance.

    Weights are drawn alike for all input channels; only a fold makes each slice inversely
    proportional to its branch. So weights that come from an equalized file are known by
    themselves, whatever way they came.
    """
    sizes, errors = zip(*(_size(part) for part in _slices(weight, fusion)), strict=True)
    pairs = [(s, e, d) for s, e, d in zip(sizes, errors, stds, strict=True) if s > 0.0 and d > 0.0]
    if len(pairs) < 2:
        return False
    doubt = 4.0 * max(e for _, e, _ in pairs) * 2**0.5
    plain = [s for s, _, _ in pairs]
    evened = [s * d for s, _, d in pairs]
    differ: bool = max(plain) / min(plain) > 1.1 + doubt
    alike: bool = max(evened) / min(evened) < 1.05 + doubt
    return differ and alike


def _slices(weight: Tensor, fusion: Fusion) -> list[Tensor]:
    if fusion.groups > 1 and not fusion.transposed:
        weight = weight.reshape(fusion.groups, -1, *weight.shape[1:])
        weight = weight.transpose(1, 2).flatten(0, 1)  # (in channels, ...)
        return [weight[b.start : b.stop] for b in fusion.branches]
    dim = 0 if fusion.transposed else 1
    return [weight.narrow(dim, b.start, b.width) for b in fusion.branches]


def _size(part: Tensor) -> tuple[float, float]:
    """Root mean square, and its relative standard error."""
    squares = part.detach().double().square()
    mean = squares.mean()
    if not float(mean) > 0.0:
        return 0.0, 0.0
    error = squares.std(correction=0) / mean / 2.0 / squares.numel() ** 0.5
    return float(mean.sqrt()), float(torch.nan_to_num(error))
