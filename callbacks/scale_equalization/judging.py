"""Turns the notes of a watched forward pass into fusions and refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .fusion import Branch, Findings, Fusion, Refusal
from .operations import TRANSPOSED
from .patterns import matches, within
from .trace import Call, Trace
from .tracer import clean_name, trained_weights

Homes = list[tuple[str, str]]


def judge(
    model: nn.Module, trace: Trace, include: Sequence[str], exclude: Sequence[str]
) -> Findings:
    """What can be equalized and what cannot, with the reason, in the order of the forward pass."""
    holders = owners(model)
    fusions: dict[int, Fusion] = {}
    refusals: list[Refusal] = []
    for key, calls in trace.calls.items():
        if not any(call.is_fused or call.obstacle for call in calls):
            continue
        homes = _own_first(holders.get(key, []), calls)
        name = homes[0][0] if homes else calls[0].module
        excluded = not matches(name, include) or matches(name, exclude)
        reason = _reason_against(model, calls, homes, trace.cancelled.get(key))
        if excluded:
            reason = "excluded by the include and exclude patterns"
        if not reason:
            fusions[key] = _fusion(homes[0], calls, _norm(model, trace.norms.get(key)))
        elif not excluded or any(call.is_fused for call in calls):
            refusals.append(Refusal(name or "the model", reason))
    refusals += _take_out_namesakes(fusions)
    for module, reason in _elsewhere(trace):
        if within([module], include) and not within([module], exclude):
            refusals.append(Refusal(module or "the model", reason))
    found = _with_upstream(fusions, trace)
    return Findings(found, tuple(dict.fromkeys(refusals)), tuple(trace.seen))


def owners(model: nn.Module) -> dict[int, Homes]:
    """For the identity of each parameter, the (module name, parameter name) pairs that hold it."""
    found: dict[int, Homes] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append((clean_name(module_name), name))
    for module_name, (parameter, key) in trained_weights(model).items():
        found[key] = [(module_name, parameter)]
    return found


def _own_first(homes: Homes, calls: list[Call]) -> Homes:
    """Of several modules that hold a weight, the one that is called with a concatenation first."""
    callers = {call.module for call in calls if call.is_fused or call.obstacle}
    return sorted(homes, key=lambda home: home[0] not in callers)


def _reason_against(
    model: nn.Module, calls: list[Call], homes: Homes, cancelled: str | None
) -> str:
    """Why this consumer cannot be equalized; "" if it can."""
    if not homes:
        return _computed(model, calls[0])
    others = [f"{module}.{name}".lstrip(".") for module, name in homes[1:]]
    others += _overlapping(model, calls[0].weight)
    if others:
        return f"its weight is shared with {', '.join(others)}"
    obstacle = next((call.obstacle for call in calls if call.obstacle), "")
    if obstacle:
        return obstacle
    if not all(call.is_fused for call in calls):
        return "its weight is also used on an input that is not this concatenation"
    if len({call.widths for call in calls}) > 1:
        return "it is called with concatenations of different widths"
    if cancelled and _each_group_has_one_branch(calls[0]):
        return f"depthwise, followed by its own normalization {cancelled}: a factor cancels there"
    return ""


def _computed(model: nn.Module, call: Call) -> str:
    """Why a weight that is no parameter of the model cannot be changed."""
    layer = model.get_submodule(call.module) if call.module else model
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized: it is computed from others at every call"
    if any(buffer is call.weight for buffer in model.buffers()):
        return "its weight is a buffer, which is not trained"
    return "its weight is computed (by weight_norm, a cast, ...), not a parameter of the model"


def _overlapping(model: nn.Module, weight: Tensor) -> list[str]:
    """Names of other parameters that live in the same memory."""
    first, last = _memory(weight)
    return [
        clean_name(name)
        for name, other in model.named_parameters()
        if other is not weight and first < _memory(other)[1] and _memory(other)[0] < last
    ]


def _memory(tensor: Tensor) -> tuple[int, int]:
    first = tensor.data_ptr()
    return first, first + (tensor.numel() * tensor.element_size() if first else 0)


def _each_group_has_one_branch(call: Call) -> bool:
    per_group = sum(call.widths) // call.groups
    return all(width % per_group == 0 for width in call.widths)


def _fusion(home: tuple[str, str], calls: list[Call], norm: str | None) -> Fusion:
    name, parameter = home
    call = calls[0]
    assert call.layout is not None
    branches: list[Branch] = []
    start = 0
    for index, width in call.layout.runs:
        part = call.layout.parts[index]
        branches.append(
            Branch(start, start + width, part.upsampling, part.interpolation, part.source)
        )
        start += width
    return Fusion(
        name=name,
        weight_shape=tuple(call.weight.shape),
        groups=call.groups,
        branches=tuple(branches),
        transposed=call.kind in TRANSPOSED,
        norm=norm,
        parameter=parameter,
    )


def _norm(model: nn.Module, name: str | None) -> str | None:
    """The module that normalizes, if it is one and not a function in some larger module."""
    module = None if name is None else model.get_submodule(name)
    return name if hasattr(module, "num_features") else None


def _take_out_namesakes(fusions: dict[int, Fusion]) -> list[Refusal]:
    """A fusion is known by its module's name, so that a module can have one only."""
    names = [fusion.name for fusion in fusions.values()]
    double = {name for name in names if names.count(name) > 1}
    for key in [key for key, fusion in fusions.items() if fusion.name in double]:
        del fusions[key]
    reason = "several of its weights take concatenations; give each weight a module of its own"
    return [Refusal(name or "the model", reason) for name in sorted(double)]


def _with_upstream(fusions: dict[int, Fusion], trace: Trace) -> tuple[Fusion, ...]:
    """The fusions with the names of those whose output reaches them."""
    found = []
    for key, fusion in fusions.items():
        reaching = frozenset[int]().union(*(call.origin.upstream for call in trace.calls[key]))
        names = tuple(other.name for k, other in fusions.items() if k in reaching)
        found.append(replace(fusion, upstream=names))
    return tuple(found)


def _elsewhere(trace: Trace) -> Iterator[tuple[str, str]]:
    """What is fused at no linear layer that is followed."""
    for note in trace.sums:
        yield note.module, "branches are fused by a sum: there is no input slice to scale"
    yield from trace.lost
