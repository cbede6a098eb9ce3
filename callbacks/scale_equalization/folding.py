"""Changes the weights as a report says, in place, once.

`ScaleEqualizer` is the explicit module of the paper's Eq. (9), the form the others are tested
against. Nothing here watches a forward pass: `fold_` also applies a report read from a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .eligibility import counts_as_equalized
from .fusion import AlreadyEqualizedError, Fusion, ScaleEqualizationError, UnsupportedFusionError
from .layers import (
    SCALED,
    layer_of,
    mark_equalized,
    multiplied,
    trained_parameter,
)
from .options import Options
from .report import Measure, Report
from .sums.scaling import checked_sums, scale_sums_


class ScaleEqualizer(nn.Module):
    """(x - mean) / std with two constants: the explicit form, one for each branch.

    >>> ScaleEqualizer(mean=1.0, std=2.0)(torch.tensor([5.0]))
    tensor([2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape and dtype."""
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)


def fold_(model: nn.Module, report: Report, *, force: bool = False) -> Report:
    """Multiply every slice of every fusion's weight by its scale, in place, once (Eq. 9).

    So are, if the report names sums, their producers or edge weights. All layers are checked before
    the first is changed.

    Args:
        model: The network the report was made for.
        report: Its `scale` of each branch is applied, and its means if `report.center`.
        force: Change layers too that were equalized before.

    Returns:
        The report, with ``mode="fold"``.

    Raises:
        AlreadyEqualizedError: A layer was equalized before.
        ScaleEqualizationError: A layer is missing, has another shape, or its weight would overflow.
    """
    layers = checked_layers(model, report, force)
    checked_sums(model, report.sums, force)
    new = [
        multiplied(trained_parameter(layer, f.parameter), _factor(f, report)) for f, layer in layers
    ]
    scale_sums_(model, report.sums)
    with torch.no_grad():
        for (fusion, layer), weight in zip(layers, new, strict=True):
            if report.center:
                fold_means_(layer, fusion, report)
            own = trained_parameter(layer, fusion.parameter)
            mark_equalized(layer, "fold", [own], report.scales(fusion))
            own.copy_(weight)
    return replace(report, mode="fold")


def checked_layers(model: nn.Module, report: Report, force: bool) -> list[tuple[Fusion, nn.Module]]:
    """The layers of a report, or an error before anything is changed."""
    if not report.fusions and not report.sums:
        raise ScaleEqualizationError("the report names no fusion: there is nothing to apply")
    layers = []
    for fusion in report.fusions:
        layer = layer_of(model, fusion)
        if hasattr(layer, SCALED) or (not force and counts_as_equalized(layer, fusion)):
            raise AlreadyEqualizedError(
                f"{fusion.name} is equalized already; scale equalization is an initialization. "
                "Build the network afresh, or pass force=True if you mean it"
                + (" (a reparametrized network has to be baked first)" if force else "")
            )
        if report.center and layer.bias is None and not fusion.norm:
            raise UnsupportedFusionError(
                f"{fusion.name} has no bias to take up the mean; leave out center"
            )
        _require_finite(layer, fusion, report)
        layers.append((fusion, layer))
    return layers


def _require_finite(layer: nn.Module, fusion: Fusion, report: Report) -> None:
    weight = trained_parameter(layer, fusion.parameter)
    if not bool(torch.isfinite(multiplied(weight, _factor(fusion, report))).all()):
        raise ScaleEqualizationError(
            f"{fusion.name}: its scaled weight is not finite in {weight.dtype}; equalize in "
            "float32 before the weights are cast, or leave the layer out by "
            f"exclude=({fusion.name!r}, ...)"
        )


def _factor(fusion: Fusion, report: Report) -> Tensor:
    return channel_factor(fusion, report.scales(fusion))


def with_options(model: nn.Module, report: Report, options: Options) -> Report:
    """The report with the scales that the options ask for.

    Args:
        model: Its weights give the norms.
        report: Freshly measured: every scale is 1 / std.
        options: With `center`, the means are to be folded into the biases too. With
            `preserve_norm`, all scales of a fusion are multiplied by the constant that leaves the
            norm of its weight as it is; with `placebo`, every slice is divided by that constant.
    """
    groups = tuple(
        _rescaled(model, fusion, measures, options)
        for fusion, measures in zip(report.fusions, report.measures, strict=True)
    )
    notes = report.notes
    if options.center:
        notes += tuple(_center_notes(model, report))
    return replace(report, measures=groups, center=options.center, notes=notes)


def scaled_weight(weight: Tensor, fusion: Fusion, scales: Sequence[float]) -> Tensor:
    """The weight with every branch's slice multiplied."""
    return multiplied(weight, channel_factor(fusion, scales))


def channel_factor(fusion: Fusion, values: Sequence[float]) -> Tensor:
    """One value a branch, laid out so that it broadcasts against the weight; float64.

    A convolution's weight is (out, in / groups, ...): output channels of group g see the input
    channels of group g. A transposed one is (in, out / groups, ...).
    """
    line = torch.cat(
        [
            torch.full((branch.width,), value, dtype=torch.float64, device="cpu")
            for branch, value in zip(fusion.branches, values, strict=True)
        ]
    )
    tail = (1,) * (len(fusion.weight_shape) - 2)
    if fusion.transposed:
        return line.view(-1, 1, *tail)
    if fusion.groups == 1:
        return line.view(1, -1, *tail)
    rows = fusion.weight_shape[0] // fusion.groups
    return (
        line.view(fusion.groups, -1)
        .repeat_interleave(rows, dim=0)
        .view(*fusion.weight_shape[:2], *tail)
    )


def _rescaled(
    model: nn.Module, fusion: Fusion, measures: tuple[Measure, ...], options: Options
) -> tuple[Measure, ...]:
    if not (options.preserve_norm or options.placebo):
        return measures
    layer = layer_of(model, fusion)
    weight = trained_parameter(layer, fusion.parameter).detach().cpu().double()
    factor = channel_factor(fusion, [m.scale for m in measures])
    before, after = float(weight.norm()), float((weight * factor).norm())
    growth = after / before if before > 0.0 and after > 0.0 else 1.0
    if not math.isfinite(growth):
        raise ScaleEqualizationError(
            f"{fusion.name}: the norm of its weight is not finite, so it cannot be preserved"
        )
    return tuple(
        replace(m, scale=growth if options.placebo else m.scale / growth) for m in measures
    )


def fold_means_(layer: nn.Module, fusion: Fusion, report: Report) -> None:
    """Take what the branch means add to each output channel, away from borders, off the bias."""
    if not isinstance(layer.bias, Tensor):
        return
    measures = report.measures[report.fusions.index(fusion)]
    means = channel_factor(fusion, [m.mean * m.scale for m in measures])
    weight = trained_parameter(layer, fusion.parameter)
    response = weight.detach().cpu().double() * means
    response = response.reshape(*response.shape[:2], -1).sum(dim=2)
    if fusion.transposed:
        response = response.view(fusion.groups, -1, response.shape[1]).sum(dim=1).flatten()
    else:
        response = response.sum(dim=1)
    bias = layer.bias.detach().cpu().double() - response
    layer.bias.copy_(bias.to(layer.bias.device, layer.bias.dtype))


def _center_notes(model: nn.Module, report: Report) -> Iterator[str]:
    for fusion in report.fusions:
        if layer_of(model, fusion).bias is None:
            yield f"{fusion.name} has no bias: its means stay, and {fusion.norm} removes them"
        elif len(fusion.weight_shape) > 2 and max(fusion.weight_shape[2:]) > 1:
            yield f"{fusion.name}: the folded mean is exact only away from zero-padded borders"
