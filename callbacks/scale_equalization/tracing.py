"""find_fusions: every layer of a network that fuses concatenated feature maps; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .fusion import Branch, Findings, Fusion, NoFusionError, Refusal
from .provenance import TRANSPOSED
from .state import calibrating
from .tracer import Call, Trace, Tracer, clean_name

# A pretrained encoder is trained as it is: its own concatenations are no feature fusion.
DEFAULT_EXCLUDE = ("encoder.*", "*.encoder.*", "backbone.*", "*.backbone.*")


def find_fusions(
    model: nn.Module,
    *inputs: Any,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    **kwargs: Any,
) -> tuple[Fusion, ...]:
    """Find the layers whose input channels are concatenated branches, in forward order.

    Args:
        model: Any network; DDP and `torch.compile` wrappers are looked through.
        *inputs: Passed to ``model(*inputs, **kwargs)`` once, without gradients.
        include: Shell patterns of the consumers' names to take.
        exclude: Shell patterns to leave alone; by default the encoder.
        **kwargs: Passed to the model.

    Raises:
        NoFusionError: None was found; the message lists what was seen instead.

    >>> import torch
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fuse = nn.Conv2d(6, 4, 3)
    ...     def forward(self, x):
    ...         return self.fuse(torch.cat([x, x.flip(3)], dim=1))
    >>> find_fusions(Net(), torch.zeros(1, 3, 8, 8))[0].name
    'fuse'
    """
    model = unwrap(model)
    findings = examine(model, lambda: model(*inputs, **kwargs), include=include, exclude=exclude)
    require_fusions(findings)
    return findings.fusions


def require_fusions(findings: Findings) -> None:
    """Raise NoFusionError, with everything that was seen, if there is nothing to equalize."""
    if findings.fusions:
        return
    lines = ["no concatenation that feeds a linear layer can be equalized."]
    lines += [f"  seen: {text}" for text in findings.seen] or ["  no concatenation was seen"]
    lines += [f"  left alone: {r.name}: {r.reason}" for r in findings.refusals]
    lines.append("Check include/exclude, and that the forward pass given runs the decoder.")
    raise NoFusionError("\n".join(lines))


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of DDP, DataParallel, torch.compile and Fabric."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    names = ("module",) if isinstance(model, wrappers) else ("_orig_mod", "_forward_module")
    inner = next((m for m in (getattr(model, n, None) for n in names) if m is not None), None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def examine(
    model: nn.Module,
    forward: Callable[[], Any],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> Findings:
    """Watch one call of `forward`, which runs `model`, and judge what was seen."""
    tracer = Tracer(model)
    with calibrating(model), tracer.watching():
        forward()
    return _judge(model, tracer.trace, include, exclude)


def owners(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """For the identity of each parameter, the (module name, parameter name) pairs that hold it."""
    found: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append((clean_name(module_name), name))
    return found


def _judge(
    model: nn.Module, trace: Trace, include: Sequence[str], exclude: Sequence[str]
) -> Findings:
    holders = owners(model)
    fusions: dict[int, Fusion] = {}
    refusals: list[Refusal] = []
    for key, calls in trace.calls.items():
        if not any(_is_fused(call) for call in calls):
            continue
        homes = holders.get(key, [])
        name = homes[0][0] if homes else calls[0].module
        if not _matches(name, include) or _matches(name, exclude):
            refusals.append(Refusal(name, "excluded by the include and exclude patterns"))
            continue
        reason = _reason_against(calls, homes, trace.norms.get(key))
        if reason:
            refusals.append(Refusal(name, reason))
            continue
        known = [fusions[k].name for k in calls[0].origin.upstream if k in fusions]
        fusions[key] = _fusion(name, homes[0][1], calls[0], trace.norms.get(key), known)
    refusals += _sums(trace, exclude)
    return Findings(tuple(fusions.values()), tuple(dict.fromkeys(refusals)), tuple(trace.seen))


def _is_fused(call: Call) -> bool:
    return call.layout is not None and len(call.layout.runs) > 1


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _reason_against(calls: list[Call], homes: list[tuple[str, str]], norm: str | None) -> str:
    """Why this consumer cannot be equalized; "" if it can."""
    if not homes:
        return "its weight is computed (parametrized or quantized), not a plain parameter"
    if len(homes) > 1:
        others = ", ".join(module for module, _ in homes[1:])
        return f"its weight is shared with {others}"
    blocked = next((call.origin.blocked for call in calls if call.origin.blocked), None)
    if blocked:
        return blocked
    if any(not _is_fused(call) for call in calls):
        return "its weight is also used on an input that is not this concatenation"
    if len({_widths(call) for call in calls}) > 1:
        return "it is called with concatenations of different widths"
    if norm and _each_group_has_one_branch(calls[0]):
        return f"depthwise, followed by its own normalization {norm}: a factor would cancel there"
    return ""


def _widths(call: Call) -> tuple[int, ...]:
    return tuple(width for _, width in call.layout.runs) if call.layout else ()


def _each_group_has_one_branch(call: Call) -> bool:
    per_group = sum(_widths(call)) // call.groups
    return all(width % per_group == 0 for width in _widths(call))


def _fusion(name: str, parameter: str, call: Call, norm: str | None, known: list[str]) -> Fusion:
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
        upstream=tuple(known),
        parameter=parameter,
    )


def _sums(trace: Trace, exclude: Sequence[str]) -> list[Refusal]:
    """Additions that fuse levels: of a resized map, or of an encoder's map and another's."""
    refusals = []
    for note in trace.sums:
        inside = _matches(note.module + ".", exclude)
        resized = any(summand.upsampling != 1.0 for summand in note.summands)
        lateral = len({_matches(summand.source, exclude) for summand in note.summands}) > 1
        if not inside and (resized or lateral):
            reason = "branches are fused by a sum: there is no input slice to scale"
            refusals.append(Refusal(note.module or "the model", reason))
    return refusals
