"""Whether a mean can be taken out of a fusion: by the layer's bias, and where maps are joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .finding import Observer
from .finding.calls import Call
from .finding.notes import Join
from .finding.probing import Evidence
from .folding import channel_factor
from .fusion import Fusion, UnsupportedFusionError
from .layers import trained_weight
from .planning import Plan
from .state import calibrating

SHIFT = 1.0


def require_centrable(
    model: nn.Module, plan: Plan, evidence: Evidence, forward: Callable[[], Any]
) -> None:
    """Check on a batch that subtracting a mean from a branch is what changing the bias does.

    Raises:
        UnsupportedFusionError: A constant added to a branch does not arrive as that constant (a
            ReLU, a zero padding between), or the layer's response to a constant is none, not even
            in the middle of the map (a strided transposed convolution).
    """
    inputs = _Inputs(model, plan)
    _run(inputs, model, forward)
    for group, parts in enumerate(evidence.groups):
        shifted = _Shifted(model, plan, inputs, {number for number, _ in parts})
        _run(shifted, model, forward)
        for arrival in evidence.arrivals:
            number = arrival.call.number
            if number not in inputs.seen or number not in shifted.seen or not arrival.labels:
                continue
            table = torch.stack(arrival.labels, dim=1)
            order = torch.arange(table.shape[1], device=table.device)
            last = torch.where(table > 0, order, -1).amax(dim=1)
            channels = (last == group).nonzero().flatten()
            before, after = inputs.seen[number], shifted.seen[number]
            dim = arrival.call.dim
            gain = (after - before).index_select(dim, channels.to(before.device)) - SHIFT
            size = SHIFT + float(before.abs().amax())
            if gain.numel() and float(gain.abs().amax()) > 1e-2 * size * _unit(before):
                name = inputs.known[arrival.call.key].name
                raise UnsupportedFusionError(
                    f"{name}: what lies between the concatenation and the layer does not pass a "
                    f"mean on as it is (a ReLU, a padding); leave out center, or the layer by "
                    f"exclude=({name!r}, ...)"
                )


def _unit(values: Tensor) -> float:
    return 1.0 if values.dtype in (torch.float16, torch.bfloat16) else 1e-2


def _run(observer: Observer, model: nn.Module, forward: Callable[[], Any]) -> None:
    with calibrating(model), observer.watching():
        forward()


class _Inputs(Observer):
    """The inputs of all fusions' layers as they are, and the outputs of all layers."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__(model, plan.exclude)
        self.known = {id(trained_weight(model, fusion)): fusion for fusion in plan.fusions}
        self.seen: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def consume(self, call: Call) -> Tensor | None:
        output = call.run()
        self.outputs[call.number] = output.clone()
        fusion = self.known.get(call.key)
        if fusion is not None:
            if call.bias is None:  # its means stay where they are
                return output
            _require_constant_response(call, fusion)
            self.seen[call.number] = call.input.clone()
        return output


class _Shifted(Observer):
    """The same with a constant added to the operands of some joins; levels are kept apart."""

    def __init__(self, model: nn.Module, plan: Plan, inputs: _Inputs, joins: set[int]) -> None:
        super().__init__(model, plan.exclude)
        self.inputs, self.joins = inputs, joins
        self.seen: dict[int, Tensor] = {}

    def join(self, join: Join, part: int, values: Tensor) -> Tensor:
        shift = join.number in self.joins and values.is_floating_point()
        return values + SHIFT if shift else values

    def consume(self, call: Call) -> Tensor | None:
        if call.number in self.inputs.seen:
            self.seen[call.number] = call.input.clone()
        known = self.inputs.outputs.get(call.number)
        return None if known is None else known.clone()


def _require_constant_response(call: Call, fusion: Fusion) -> None:
    inside = interior(call, fusion)
    for dim in range(call.dim + 1, inside.dim()):
        n = inside.shape[dim]
        inside = inside.narrow(dim, max((n - 2) // 2, 0), min(2, n))
    if not bool(inside.all()):
        raise UnsupportedFusionError(
            f"{fusion.name}: its response to a constant input is not constant, so no bias can take "
            "up the mean (a transposed convolution with strides, or a map no larger than its "
            f"borders); leave out center, or the layer by exclude=({fusion.name!r}, ...)"
        )


def interior(call: Call, fusion: Fusion) -> Tensor:
    """Where the layer's response to a constant for each branch is what a bias can be."""
    values = [1.0 + 0.1 * index for index in range(len(fusion.branches))]
    shape = [1] * call.rank
    shape[call.dim] = fusion.in_channels
    pairs = zip(fusion.branches, values, strict=True)
    line = torch.cat(
        [torch.full((b.width,), v, dtype=torch.float64, device="cpu") for b, v in pairs]
    )
    constant = line.view(shape).to(call.input.device).expand(call.input.shape).contiguous()
    weight = call.weight.detach().double().abs() + 1e-3
    response = call.run(input=constant, weight=weight, bias=None)
    whole = weight.cpu() * channel_factor(fusion, values)
    whole = whole.reshape(*weight.shape[:2], -1).sum(dim=2)
    if fusion.transposed:
        whole = whole.view(fusion.groups, -1, whole.shape[1]).sum(dim=1).flatten()
    else:
        whole = whole.sum(dim=1)
    view = [1] * response.dim()
    view[call.dim] = -1
    whole = whole.view(view).to(response.device)
    return (response - whole).abs() <= 1e-9 * whole.abs()
