"""Train V with W = V * scale: the dynamics of the explicit equalizer, without scaling a map.

The parameter object stays the very same and stays where it is: V is the layer's parameter under its
own name, so that optimizers, DDP's gradient hooks and everything else that holds it go on.
`layer.weight` becomes V * scale by a property of a subclass made for the layer; nothing is
registered and no hook is set. State dicts hold the plain weight W, and plain weights load. A state
dict's W is a product, yet what is written into it (by a moving average, say) reaches V when the
layer is next used, copied or saved; `functional_call` with it takes it for W. With other tensors
`functional_call` takes them for V, as `named_parameters` gives it: not for a state dict's values
that were changed in a copy. What is written into `layer.weight` itself is lost, as with PyTorch's
parametrizations; another parameter in its place is refused.
PyTorch's own parametrizations were not chosen: they give the parameter another gradient
accumulator, which DDP does not know, so that ranks drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .folding import channel_factor, checked_layers, fold_means_
from .fusion import ScaleEqualizationError
from .layers import (
    MARK,
    SCALED,
    mark_equalized,
    multiplied,
    reparametrized,
    trained_parameter,
    trained_weight,
)
from .report import Report

__all__ = ["bake_", "reparametrize_", "reparametrized", "trained_weight"]


def reparametrize_(
    model: nn.Module, report: Report, *, force: bool = False, continued: bool = False
) -> Report:
    """Train V with W = V * scale, which has exactly the dynamics of the explicit equalizer.

    `bake_` ends it. Args and errors are those of `fold_`; with `continued`, the weights are those
    of an equalized network already (a checkpoint of this mode): V = W / scale.
    """
    layers = checked_layers(model, report, force or continued)
    for fusion, layer in layers:
        weight = trained_parameter(layer, fusion.parameter)
        factor = channel_factor(fusion, report.scales(fusion))
        originals = [] if continued else [weight]
        mark_equalized(layer, "reparametrize", originals, report.scales(fusion))
        with torch.no_grad():
            if continued:
                weight.copy_(multiplied(weight, 1.0 / factor))
            elif report.center:
                fold_means_(layer, fusion, report)
        _begin(layer, fusion.parameter, factor)
    return replace(report, mode="reparametrize")


def bake_(model: nn.Module) -> nn.Module:
    """Turn every reparametrized layer back into one with a plain weight; returns the model."""
    for _, layer in reparametrized(model):
        name = getattr(layer, SCALED)
        weight = trained_parameter(layer, name)
        with torch.no_grad():
            weight.copy_(getattr(layer, name))
        layer.__class__ = type(layer).__mro__[2]
        for attribute in (SCALED, "_scale_factor", "_scale_as_used", _SAVED):
            vars(layer).pop(attribute, None)
        setattr(layer, MARK, "reparametrize")
    return model


_SAVED = "_scale_saved"  # of a layer: W as the last state dict has it, V then, and its version


def _begin(layer: nn.Module, name: str, factor: Tensor) -> None:
    setattr(layer, SCALED, name)
    layer._scale_factor = factor.clone()  # float64, on the CPU
    kind: Any = type(layer)
    layer.__class__ = _subclass(kind, name)
    layer._prepare()  # type: ignore[operator]


class _Scaled(nn.Module):
    """What the layer's own class is mixed with."""

    def _prepare(self) -> None:
        """The factor as it multiplies: where the weight is, in float32 at least."""
        weight = trained_parameter(self, getattr(self, SCALED))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        factor: Any = self._scale_factor
        self._scale_as_used: Any = factor.to(weight.device, dtype)

    def _take_up_writes(self) -> None:
        """Bring into V what was written into the last state dict's W."""
        saved = self.__dict__.get(_SAVED)
        values = trained_parameter(self, getattr(self, SCALED))
        if saved is None or saved[1] is not values:  # none, or functional_call is at work
            return
        product, _, version, product_version = saved
        if values._version != version:
            del self.__dict__[_SAVED]
            if product._version != product_version:
                raise ScaleEqualizationError(
                    f"the {getattr(self, SCALED)} of a state dict was written into after the layer "
                    "was trained on (mode='reparametrize'): take a new state_dict() to write "
                    "into, or clone its values to keep them"
                )
        elif not torch.equal(product, _product(self, values)):
            factor: Any = self._scale_factor
            with torch.no_grad():
                values.copy_(multiplied(product, 1.0 / factor))
            self.__dict__[_SAVED] = product, values, values._version, product._version

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self._take_up_writes()
        self.__dict__.pop(_SAVED, None)
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._prepare()
        return result

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = getattr(self, SCALED)
        if prefix + name in destination:
            values, product = trained_parameter(self, name), getattr(self, name).detach()
            saved = self.__dict__.get(_SAVED)
            if saved is not None and saved[1] is not values:  # functional_call is at work
                saved = product, None, 0, 0
            elif saved is None:
                saved = product, values, values._version, product._version
                self.__dict__[_SAVED] = saved
            destination[prefix + name] = product if saved is None else saved[0]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.__dict__.pop(_SAVED, None)
        key = prefix + getattr(self, SCALED)
        plain = state_dict.get(key)
        if isinstance(plain, Tensor):
            factor: Any = self._scale_factor
            state_dict = {**state_dict, key: multiplied(plain, 1.0 / factor)}
        self.__dict__["_scale_loading"] = True  # load_state_dict(assign=True) sets the parameter
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            del self.__dict__["_scale_loading"]

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__
        if isinstance(value, Tensor) and name == own.get(SCALED) and "_scale_loading" not in own:
            raise ScaleEqualizationError(
                f"{name} is computed from what is trained (mode='reparametrize'), so no other can "
                "be set: bake_(model) first, or load a state dict"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Refused: what is drawn would be lost."""
        raise ScaleEqualizationError(
            "a reparametrized layer cannot be initialized again: bake_(model) first"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._take_up_writes()
        base = type(self).__mro__[2]
        own = {name: value for name, value in self.__dict__.items() if name != _SAVED}
        return _restore, (base, getattr(self, SCALED)), own


def _restore(base: Any, name: str) -> nn.Module:
    cls = _subclass(base, name)
    return cls.__new__(cls)


@cache
def _subclass(base: type[nn.Module], name: str) -> type[nn.Module]:
    def weight(layer: Any) -> Tensor:
        layer._take_up_writes()
        values = trained_parameter(layer, name)
        return values if _is_saved(layer, values) else _product(layer, values)

    body = {name: property(weight), "__module__": base.__module__}
    return type(base.__name__, (_Scaled, base), body)


def _product(layer: nn.Module, values: Tensor) -> Tensor:
    factor: Any = layer._scale_as_used
    product: Tensor = values * factor
    return product if product.dtype == values.dtype else product.to(values.dtype)


def _is_saved(layer: nn.Module, values: Tensor) -> bool:
    """Whether `functional_call` has put a state dict's W, or a clone of it, in the place of V."""
    saved = vars(layer).get(_SAVED)
    if saved is None or saved[1] is values:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(values):
        return False
    alike = saved[0].device == values.device and saved[0].dtype == values.dtype
    return saved[0] is values or (alike and bool(torch.equal(saved[0], values)))
