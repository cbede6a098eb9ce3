"""Changes the weights as a report says: folded once, or as a reparametrization; and back.

`ScaleEqualizer` is the explicit module of the paper's Eq. (9), the form the others are tested
against. Nothing here watches a forward pass: `fold_` also applies a report read from a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .fusion import AlreadyEqualizedError, Fusion, ScaleEqualizationError, UnsupportedFusionError
from .report import Measure, Report

_MARK = "_scale_equalized"


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

    All layers are checked before the first is changed.

    Args:
        model: The network the report was made for.
        report: Its `scale` of each branch is applied, and its means if `report.center`.
        force: Change layers too that were equalized or trained before.

    Returns:
        The report, with ``mode="fold"``.

    Raises:
        AlreadyEqualizedError: A layer was equalized or trained before.
        ScaleEqualizationError: A layer is missing or has another shape.
    """
    layers = _checked(model, report, force)
    with torch.no_grad():
        for fusion, layer in layers:
            weight = layer.get_parameter(fusion.parameter)
            if report.center and isinstance(layer.bias, Tensor):
                layer.bias -= _mean_response(weight, fusion, report)
            weight.copy_(scaled_weight(weight, fusion, report.scales(fusion)))
            setattr(layer, _MARK, "fold")
    return replace(report, mode="fold")


def reparametrize_(
    model: nn.Module, report: Report, *, force: bool = False, continued: bool = False
) -> Report:
    """Train V with W = V * scale, which has exactly the dynamics of the explicit equalizer.

    The parameter object stays the same, so optimizers and DDP keep it; `state_dict` holds the
    plain weight W under its plain name, and plain weights load. `bake_` ends it.

    Args and errors are those of `fold_`; with `continued`, the weights are those of an equalized
    network already (a checkpoint of this mode): V = W / scale.
    """
    layers = _checked(model, report, force or continued)
    for fusion, layer in layers:
        name, weight = fusion.parameter, layer.get_parameter(fusion.parameter)
        factor = channel_factor(fusion, report.scales(fusion)).to(weight.device, weight.dtype)
        with torch.no_grad():
            if continued:
                weight.div_(factor)
            elif report.center and isinstance(layer.bias, Tensor):
                layer.bias -= _mean_response(weight, fusion, report)
        parametrize.register_parametrization(layer, name, _Scaled(factor), unsafe=True)
        hooks = (
            layer.register_state_dict_post_hook(_write_plain_weight),  # type: ignore[no-untyped-call]
            layer.register_load_state_dict_pre_hook(_read_plain_weight),  # type: ignore[no-untyped-call]
        )
        setattr(layer, _MARK, hooks)
    return replace(report, mode="reparametrize")


def bake_(model: nn.Module) -> nn.Module:
    """Turn every reparametrized layer back into one with a plain weight; returns the model."""
    for _, layer in reparametrized(model):
        for hook in getattr(layer, _MARK):
            hook.remove()
        for name in _scaled_names(layer):
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
        setattr(layer, _MARK, "reparametrize")
    return model


def trained_weight(model: nn.Module, fusion: Fusion) -> Tensor:
    """The tensor the optimizer trains: V of a reparametrized layer, else the weight itself."""
    layer: Any = model.get_submodule(fusion.name)
    if parametrize.is_parametrized(layer, fusion.parameter):
        original: Tensor = layer.parametrizations[fusion.parameter].original
        return original
    weight: Tensor = layer.get_parameter(fusion.parameter)
    return weight


def reparametrized(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers `reparametrize_` has changed and `bake_` has not changed back."""
    return [
        (name, m) for name, m in model.named_modules() if isinstance(getattr(m, _MARK, 0), tuple)
    ]


def with_options(
    model: nn.Module, report: Report, *, center: bool, preserve_norm: bool, placebo: bool
) -> Report:
    """The report with the scales that the options ask for.

    Args:
        model: Its weights give the norms.
        report: Freshly measured: every scale is 1 / std.
        center: Fold the means into the biases too.
        preserve_norm: Multiply all scales of a fusion by the constant that leaves the norm of its
            weight as it is, so that only the ratios of the slices change.
        placebo: Divide every slice of a fusion by that same constant instead: the control that
            changes the weight's norm as equalization does, and no ratio.
    """
    if preserve_norm and placebo:
        raise ValueError("preserve_norm and placebo exclude each other: choose one")
    if center and placebo:
        raise ValueError("a placebo folds no means: leave out center")
    groups = tuple(
        _rescaled(model, fusion, measures, preserve_norm, placebo)
        for fusion, measures in zip(report.fusions, report.measures, strict=True)
    )
    notes = report.notes + tuple(_center_notes(model, report)) if center else report.notes
    return replace(report, measures=groups, center=center, notes=notes)


def scaled_weight(weight: Tensor, fusion: Fusion, scales: Sequence[float]) -> Tensor:
    """The weight with every branch's slice multiplied; rounded once, in the weight's dtype."""
    factor = channel_factor(fusion, scales).to(weight.device, weight.dtype)
    return weight * factor


def channel_factor(fusion: Fusion, values: Sequence[float]) -> Tensor:
    """One value a branch, laid out so that it broadcasts against the weight; float64.

    A convolution's weight is (out, in / groups, ...): output channels of group g see the input
    channels of group g. A transposed one is (in, out / groups, ...).
    """
    line = torch.cat(
        [
            torch.full((branch.width,), value, dtype=torch.float64)
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


class _Scaled(nn.Module):
    """W = V * factor, as a parametrization of a layer's weight."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def _scaled_names(layer: nn.Module) -> Iterator[str]:
    for name, chain in list(layer.parametrizations.items()):  # type: ignore[operator, union-attr]
        if any(isinstance(step, _Scaled) for step in chain):
            yield name


def _write_plain_weight(
    layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    for name in _scaled_names(layer):
        state.pop(f"{prefix}parametrizations.{name}.original")
        state[prefix + name] = getattr(layer, name).detach()


def _read_plain_weight(layer: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    for name in _scaled_names(layer):
        plain = state.pop(prefix + name, None)
        if plain is not None:
            factor = layer.parametrizations[name][0].factor  # type: ignore[index, union-attr]
            state[f"{prefix}parametrizations.{name}.original"] = plain / factor.to(plain.device)


def refuse_changed(name: str, layer: nn.Module, force: bool) -> None:
    """Raise AlreadyEqualizedError if a layer was changed by this package before."""
    if hasattr(layer, _MARK) and not force:
        raise AlreadyEqualizedError(
            f"{name} is equalized already; scale equalization is an initialization. Build the "
            "network afresh, or pass force=True if you mean it"
        )


def mark_changed(layer: nn.Module) -> None:
    """Remember that a layer was changed."""
    setattr(layer, _MARK, "fold")


def _checked(model: nn.Module, report: Report, force: bool) -> list[tuple[Fusion, nn.Module]]:
    """The layers of a report, or an error before anything is changed."""
    if not report.fusions:
        raise ScaleEqualizationError("the report names no fusion: there is nothing to apply")
    layers = []
    for fusion in report.fusions:
        layer = _layer(model, fusion)
        reason = _earlier_change(model, fusion, layer)
        if reason and (not force or parametrize.is_parametrized(layer)):
            raise AlreadyEqualizedError(
                f"{fusion.name} {reason}; scale equalization is an initialization. Build the "
                "network afresh, or pass force=True if you mean it"
            )
        if report.center and layer.bias is None and not fusion.norm:
            raise UnsupportedFusionError(
                f"{fusion.name} has no bias to take up the mean; leave out center"
            )
        layers.append((fusion, layer))
    return layers


def _layer(model: nn.Module, fusion: Fusion) -> nn.Module:
    try:
        layer = model.get_submodule(fusion.name)
    except AttributeError:
        raise ScaleEqualizationError(
            f"the network has no layer {fusion.name!r}: this report was made for another one"
        ) from None
    shape = tuple(getattr(layer, fusion.parameter).shape)
    if shape != tuple(fusion.weight_shape):
        raise ScaleEqualizationError(
            f"{fusion.name}.{fusion.parameter} is {shape}, but the report was made for "
            f"{tuple(fusion.weight_shape)}"
        )
    return layer


def _earlier_change(model: nn.Module, fusion: Fusion, layer: nn.Module) -> str:
    """Why the layer is no longer at its initialization; "" if it seems to be.

    Any training step moves the affine parameters of the normalization behind a fusion, and no
    two channels alike; at initialization they are constants.
    """
    if hasattr(layer, _MARK):
        return "is equalized already"
    norm = model.get_submodule(fusion.norm) if fusion.norm else None
    for name in ("weight", "bias"):
        values = getattr(norm, name, None)
        if (
            isinstance(values, Tensor)
            and values.numel() > 1
            and not bool((values == values[0]).all())
        ):
            return f"was trained before ({fusion.norm}.{name} is no longer constant)"
    return ""


def _rescaled(
    model: nn.Module,
    fusion: Fusion,
    measures: tuple[Measure, ...],
    preserve_norm: bool,
    placebo: bool,
) -> tuple[Measure, ...]:
    if not (preserve_norm or placebo):
        return measures
    weight = _layer(model, fusion).get_parameter(fusion.parameter).detach().double()
    factor = channel_factor(fusion, [m.scale for m in measures]).to(weight.device)
    growth = float((weight * factor).norm() / weight.norm())
    return tuple(replace(m, scale=growth if placebo else m.scale / growth) for m in measures)


def _mean_response(weight: Tensor, fusion: Fusion, report: Report) -> Tensor:
    """What the branch means add to each output channel after equalization, away from borders."""
    measures = report.measures[report.fusions.index(fusion)]
    means = channel_factor(fusion, [m.mean * m.scale for m in measures])
    response = (weight.double() * means.to(weight.device)).flatten(2).sum(dim=2)
    if not fusion.transposed:
        return response.sum(dim=1).to(weight.dtype)
    return response.view(fusion.groups, -1, response.shape[1]).sum(dim=1).flatten().to(weight.dtype)


def _center_notes(model: nn.Module, report: Report) -> Iterator[str]:
    for fusion in report.fusions:
        if _layer(model, fusion).bias is None:
            yield f"{fusion.name} has no bias; {fusion.norm} removes the mean anyway"
        elif len(fusion.weight_shape) > 2 and max(fusion.weight_shape[2:]) > 1:
            yield f"{fusion.name}: the folded mean is exact only away from zero-padded borders"
