"""Whose weight it is, and whether anything but its layer uses it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from scale_equalization.layers import SCALED, layers_by_name, reparametrized, trained_parameter
from scale_equalization.patterns import clean_name

from .calls import Call, Log

Locations = list[tuple[str, str]]


def parameter_locations(model: nn.Module) -> dict[int, Locations]:
    """For the identity of each parameter, the (module name, parameter name) pairs that hold it."""
    found: dict[int, Locations] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            location = (clean_name(module_name), name)
            locations = found.setdefault(id(parameter), [])
            if location not in locations:
                locations.append(location)
    for module_name, layer in reparametrized(model):
        name = getattr(layer, SCALED)
        found[id(trained_parameter(layer, name))] = [(clean_name(module_name), name)]
    return found


def callers_first(locations: Locations, callers: set[str]) -> Locations:
    """Of several modules that hold a weight, one that is called with joined maps first."""
    return sorted(locations, key=lambda location: location[0] not in callers)


def reason_against(model: nn.Module, calls: Sequence[Call], locations: Locations, log: Log) -> str:
    """Why a weight cannot be changed for its layer alone; "" if it can."""
    if not locations:
        return _computed(model, calls[0])
    others = [f"{module}.{name}".lstrip(".") for module, name in locations[1:]]
    others += _overlapping(model, calls[0])
    if others:
        return f"its weight is shared with {', '.join(others)}"
    uses = list(dict.fromkeys(log.uses.get(calls[0].key, ())))
    if uses:
        return f"its weight is also used elsewhere: by {', '.join(uses[:3])}"
    return ""


def _computed(model: nn.Module, call: Call) -> str:
    """Why a weight that is no parameter of the model cannot be changed."""
    layer = layers_by_name(model).get(call.module, model)
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized: it is computed from others at every call"
    if any(buffer is call.weight for buffer in model.buffers()):
        return "its weight is a buffer, which is not trained"
    return "its weight is computed (by weight_norm, a cast, ...), not a parameter of the model"


def _overlapping(model: nn.Module, call: Call) -> list[str]:
    """Names of other parameters and buffers that live in the same memory."""
    own = next((p for p in model.parameters() if id(p) == call.key), call.weight)
    first, last = _memory(own)
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [
        clean_name(name)
        for name, other in tensors
        if other is not own and first < _memory(other)[1] and _memory(other)[0] < last
    ]


def _memory(tensor: Tensor) -> tuple[int, int]:
    first = tensor.data_ptr()
    if not first:
        return 0, 0
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * tensor.element_size() if tensor.numel() else first
