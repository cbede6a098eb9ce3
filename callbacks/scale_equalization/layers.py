"""A layer by its name, the parameter that is trained, and the marks of what was done to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fusion import Fusion, ScaleEqualizationError
from .patterns import clean_name

MARK = "_scale_equalized"  # attribute of a changed layer: the mode
ORIGIN = "_scale_equalized_from"  # and its scales, with digests of its parameters before
LEFT = "_scale_equalized_left"  # digests of its parameters at the end of a run
SCALED = "_scaled_parameter"  # attribute of a reparametrized layer: the parameter's name


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of DDP, DataParallel, torch.compile and Fabric."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    names = ("module",) if isinstance(model, wrappers) else ("_orig_mod", "_forward_module")
    inner = next((m for m in (getattr(model, n, None) for n in names) if m is not None), None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def multiplied(weight: Tensor, factor: Tensor) -> Tensor:
    """Weight * factor in the weight's dtype, rounded once, whatever that dtype is."""
    home = torch.device("cpu") if weight.device.type == "mps" else weight.device
    product = weight.detach().to(home, torch.float64) * factor.to(home)
    return product.to(weight.device, weight.dtype)


def mark_equalized(
    layer: nn.Module, mode: str, originals: Iterable[Tensor], scales: Sequence[float] = ()
) -> None:
    """Note in a layer what was done to it.

    Args:
        layer: Its parameters may have changed already.
        mode: What is done.
        originals: Copies of the changed parameters as they were before.
        scales: Of the branches, if it is a fusion's layer.
    """
    setattr(layer, MARK, mode)
    setattr(layer, ORIGIN, ([_digest(values) for values in originals], tuple(scales)))


def is_equalized(layer: nn.Module) -> bool:
    """Whether a layer is marked, and its weights were not set back since to those before."""
    if not hasattr(layer, MARK):
        return False
    before: list[str] = getattr(layer, ORIGIN, ([], ()))[0]
    now = {_digest(values) for values in layer._parameters.values() if values is not None}
    return hasattr(layer, SCALED) or not before or not now.issuperset(before)


def note_as_left(layer: nn.Module) -> None:
    """Note the weights that an equalized run ends with: those are no fresh ones."""
    if hasattr(layer, MARK):
        own = [_digest(values) for values in layer._parameters.values() if values is not None]
        setattr(layer, LEFT, own)


def is_as_left(layer: nn.Module) -> bool:
    """Whether a layer has the weights that an equalized run ended with."""
    own = [_digest(values) for values in layer._parameters.values() if values is not None]
    return bool(getattr(layer, LEFT, None) == own)


def _digest(values: Tensor) -> str:
    plain = values.detach().cpu().double().contiguous()
    return hashlib.sha1(plain.numpy().tobytes(), usedforsecurity=False).hexdigest()


def layers_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its clean name; of a wrapped one, what is inside."""
    return {clean_name(name): module for name, module in model.named_modules()}


def layer_of(model: nn.Module, fusion: Fusion) -> nn.Module:
    """The layer of a fusion.

    Raises:
        ScaleEqualizationError: It is missing or has another shape.
    """
    layer = layers_by_name(model).get(fusion.name)
    if layer is None:
        raise ScaleEqualizationError(
            f"the network has no layer {fusion.name!r}: this report was made for another one"
        )
    weight = layer._parameters.get(fusion.parameter)
    shape = tuple(weight.shape) if weight is not None else ()
    if shape != tuple(fusion.weight_shape):
        raise ScaleEqualizationError(
            f"{fusion.name}.{fusion.parameter} is {shape}, but the report was made for "
            f"{tuple(fusion.weight_shape)}"
        )
    return layer


def trained_parameter(layer: nn.Module, name: str) -> Tensor:
    """The tensor the optimizer trains: V of a reparametrized layer, else the weight itself."""
    parameter: Any = layer._parameters[name]
    found: Tensor = parameter
    return found


def trained_weight(model: nn.Module, fusion: Fusion) -> Tensor:
    """The same for a fusion's layer."""
    return trained_parameter(layer_of(model, fusion), fusion.parameter)


def used_weight(model: nn.Module, fusion: Fusion) -> Tensor:
    """What a fusion's layer computes with: of a reparametrized one V * scale."""
    weight: Tensor = getattr(layer_of(model, fusion), fusion.parameter)
    return weight.detach()


def reparametrized(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers `reparametrize_` has changed and `bake_` has not changed back."""
    return [(name, layer) for name, layer in model.named_modules() if SCALED in vars(layer)]
