"""Proves a change on the network itself: with a real batch, against the explicit form.

Three statements, each checked on one of the batches that were measured:

- *Before anything is changed*: real values, multiplied where they are joined, arrive at each layer
  as the finder said (`require_proportional`).
- *The explicit form*: with the weights as they were, each layer is run on its input with every
  branch divided by its std (after subtracting its mean, if centred), and each sum with its summands
  multiplied. Inputs and outputs are kept (`explicit_form`).
- *After the change*: each layer, on the very same input, gives out the same up to rounding; in
  doubt that is decided in float64, against a bound on what rounding can do. It then hands on the
  explicit output, so that everything else must be equal to the last bit. If it is not, a changed
  weight is used elsewhere (`require_equal`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .centring import interior
from .finding import Observer
from .finding.calls import Call
from .finding.observer import SumLocation
from .finding.outputs import close_outputs, outputs_of, rounding, same_outputs
from .finding.probing import DEAD, INVALID, Evidence, gather_evidence
from .fusion import Fusion, UnsupportedFusionError
from .layers import trained_weight
from .moments_observer import scaled_summands
from .planning import Plan
from .report import Report
from .state import calibrating
from .sums import SumFusion

Forward = Callable[[], Any]


def require_proportional(model: nn.Module, plan: Plan, forward: Forward) -> Evidence:
    """Check on real values that every branch arrives as itself times a factor.

    Raises:
        UnsupportedFusionError: Something between a concatenation and its layer is not linear in
            the scale of a branch on this batch.
    """
    keys = {id(trained_weight(model, fusion)): fusion for fusion in plan.fusions}
    evidence = gather_evidence(model, forward, plan.exclude, randomize=False)
    for arrival in evidence.arrivals:
        fusion = keys.get(arrival.call.key)
        if fusion is None or not arrival.labels:
            continue
        table = torch.stack(arrival.labels, dim=1)
        for index, branch in enumerate(fusion.branches):
            rows = {tuple(row) for row in table[branch.start : branch.stop].tolist()}
            seen = {row for row in rows if DEAD not in row}
            if len(seen) > 1 or any(_is_broken(row) for row in seen):
                why = next((reason for reason in arrival.reasons if reason), "")
                raise UnsupportedFusionError(
                    f"{fusion.name}: branch {index} is not passed on in proportion on a later "
                    f"batch{': ' if why else ''}{why}; leave the layer out by "
                    f"exclude=({fusion.name!r}, ...)"
                )
    return evidence


def _is_broken(identity: Sequence[int]) -> bool:
    return INVALID in identity and not any(label > 0 for label in identity)


@dataclass(eq=False)
class Explicit:
    """What the explicit form did on a batch.

    Attributes:
        calls: For each call of an equalized layer, its input and the explicit output.
        sums: For each scaled sum, its summands as they are to be, and the total.
        outputs: What the network returned.
        reached: Names of the equalized layers that ran.
    """

    calls: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sums: dict[SumLocation, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)


class _Explicit(Observer):
    def __init__(self, model: nn.Module, plan: Plan, report: Report) -> None:
        super().__init__(model, plan.exclude)
        self.report, self.done = report, Explicit()
        self.known = {id(trained_weight(model, fusion)): fusion for fusion in report.fusions}
        self.factors = _sum_factors(plan, report)

    def consume(self, call: Call) -> Tensor | None:
        fusion = self.known.get(call.key)
        if fusion is None:
            return None
        self.done.reached.add(fusion.name)
        output = call.run(input=divided(call, fusion, self.report))
        self.done.calls[call.number] = call.input.clone(), output.clone()
        return output

    def adding(
        self, location: SumLocation, operands: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if location not in self.factors:
            return operands
        fusion, factors = self.factors[location]
        first, second = scaled_summands(fusion, location, operands, factors)
        self.done.sums[location] = first.clone(), second.clone(), torch.empty(0)
        return first, second

    def added(
        self, location: SumLocation, operands: tuple[Tensor, Tensor], total: Tensor, fuses: bool
    ) -> Tensor:
        if location in self.done.sums:
            self.done.sums[location] = (*self.done.sums[location][:2], total.clone())
        return total


def divided(call: Call, fusion: Fusion, report: Report, dtype: torch.dtype | None = None) -> Tensor:
    """A layer's input with every branch divided as the report says, rounded once."""
    measures = report.measures[report.fusions.index(fusion)]
    shape = [1] * call.rank
    shape[call.dim] = fusion.in_channels
    home = torch.device("cpu") if call.input.device.type == "mps" else call.input.device

    def line(values: Sequence[float]) -> Tensor:
        parts = zip(fusion.branches, values, strict=True)
        flat = [torch.full((b.width,), v, dtype=torch.float64, device=home) for b, v in parts]
        return torch.cat(flat).view(shape)

    values = call.input.detach().to(home).double()
    if report.center and call.bias is not None:  # else the norm behind removes the mean
        values = values - line([measure.mean for measure in measures])
    values = values * line([measure.scale for measure in measures])
    return values.to(call.input.device, dtype or call.input.dtype)


def explicit_form(model: nn.Module, plan: Plan, report: Report, forward: Forward) -> Explicit:
    """Run the explicit form of a report on one batch; the weights are those before the change."""
    observer = _Explicit(model, plan, report)
    with calibrating(model), observer.watching():
        observer.done.outputs = outputs_of(forward())
    return observer.done


class _Changed(Observer):
    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        report: Report,
        explicit: Explicit,
        originals: dict[str, tuple[Tensor, Tensor | None]],
    ) -> None:
        super().__init__(model, plan.exclude)
        self.report, self.explicit, self.originals = report, explicit, originals
        self.known = {id(trained_weight(model, fusion)): fusion for fusion in report.fusions}
        self.diverged = ""

    def consume(self, call: Call) -> Tensor | None:
        fusion = self.known.get(call.key)
        if fusion is None:
            return None
        if call.number not in self.explicit.calls:
            self.diverged = self.diverged or fusion.name
            return None
        before, expected = self.explicit.calls[call.number]
        if before.shape != call.input.shape or not close_outputs([call.input], [before], 0.0):
            self.diverged = self.diverged or fusion.name
        elif not _equal_up_to_rounding(call, call.run(), expected, self._inside(call, fusion)):
            self._doubt(call, fusion)
        return expected.clone()

    def _inside(self, call: Call, fusion: Fusion) -> Tensor | None:
        """Where a centred layer is exact: away from zero-padded borders."""
        return interior(call, fusion) if self.report.center else None

    def _doubt(self, call: Call, fusion: Fusion) -> None:
        """In float64: is the difference more than rounding the weight can explain?"""
        weight, bias = self.originals[fusion.name]
        wide: dict[str, Any] = {"input": call.input.double()}
        now = call.run(**wide, weight=call.weight.double(), bias=_double(call.bias))
        wide["input"] = divided(call, fusion, self.report, torch.float64)
        then = call.run(**wide, weight=weight.double(), bias=_double(bias))
        sizes = {"input": wide["input"].abs(), "weight": weight.double().abs()}
        bound = call.run(**sizes, bias=None if bias is None else bias.double().abs())
        unit = torch.finfo(weight.dtype).eps
        wrong = (now - then).abs() > 4 * unit * bound + 1e-280
        inside = self._inside(call, fusion)
        if bool((wrong if inside is None else wrong & inside).any()):
            raise UnsupportedFusionError(
                f"{fusion.name}: with its changed weight it does not compute what the explicit "
                f"form computes; leave the layer out by exclude=({fusion.name!r}, ...)"
            )

    def adding(
        self, location: SumLocation, operands: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if location not in self.explicit.sums:
            return operands
        pairs = zip(operands, self.explicit.sums[location][:2], strict=True)
        if not all(close_outputs([now], [then], rounding(now)) for now, then in pairs):
            raise UnsupportedFusionError(
                f"the sum in {location[0] or 'the model'}: with its producers or edge weights "
                "scaled, a summand is not what it is in the explicit form; leave out sums=True"
            )
        return operands

    def added(
        self, location: SumLocation, operands: tuple[Tensor, Tensor], total: Tensor, fuses: bool
    ) -> Tensor:
        known = self.explicit.sums.get(location)
        return total if known is None else known[2].clone()


def require_equal(
    model: nn.Module,
    plan: Plan,
    report: Report,
    explicit: Explicit,
    originals: dict[str, tuple[Tensor, Tensor | None]],
    forward: Forward,
) -> None:
    """Check the changed network against the explicit form.

    Raises:
        UnsupportedFusionError: A layer, or something else that uses its weight, differs.
    """
    observer = _Changed(model, plan, report, explicit, originals)
    with calibrating(model), observer.watching():
        outputs = outputs_of(forward())
    if observer.diverged or not same_outputs(outputs, explicit.outputs):
        names = ", ".join(fusion.name for fusion in report.fusions[:5])
        where = f" (first seen at the input of {observer.diverged})" if observer.diverged else ""
        raise UnsupportedFusionError(
            f"a changed weight acts elsewhere than in its own layer{where}: one of {names}; or two "
            "runs over the same batch differ. Leave such layers out by exclude=(...)"
        )


def _sum_factors(plan: Plan, report: Report) -> dict[SumLocation, tuple[SumFusion, list[float]]]:
    pairs = zip(plan.sums, report.sums, strict=True)
    scales = [(each, [summand.scale for summand in m.summands]) for each, m in pairs]
    return {location: (each, factors) for each, factors in scales for location in each.locations}


def _double(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.double()


def _equal_up_to_rounding(
    call: Call, output: Tensor, expected: Tensor, inside: Tensor | None
) -> bool:
    difference = (output - expected).abs()
    if inside is not None:
        difference = difference * inside
    size = float(expected.abs().amax()) if expected.numel() else 0.0
    return not difference.numel() or bool((difference <= rounding(output) * size).all())
