"""Takes the moments of branches and summands while the network runs, the earlier levels scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from .eligibility import counts_as_equalized, looks_equalized
from .finding import Observer
from .finding.calls import Call
from .finding.deciding import looks_joined
from .finding.observer import SumLocation
from .folding import scaled_weight
from .fusion import Fusion, ScaleEqualizationError
from .layers import layer_of, trained_parameter
from .patterns import matches
from .statistics import Moments, is_constant, varying_std
from .sums.pairs import SumFusion, balance

Scales = dict[str, tuple[float, ...]]  # by a fusion's name, or a sum's


class MomentsObserver(Observer):
    """One forward pass that is measured.

    Args:
        model: The network.
        exclude: Patterns of what is left alone.
        fusions: Whose branches are measured.
        sums: Whose summands are measured.
        provisional: Scales the layers and sums are run with; None takes those of this very pass.
        fixed: Names of fusions that are run as they are: equalized already. Found in a pass
            without provisional scales; None scales them once more.
    """

    def __init__(
        self,
        model: nn.Module,
        exclude: Sequence[str],
        fusions: Sequence[Fusion],
        sums: Sequence[SumFusion],
        provisional: Mapping[str, tuple[float, ...]] | None,
        fixed: set[str] | None,
    ) -> None:
        super().__init__(model, exclude)
        self.fusions = fusions
        self.sums = {location: each for each in sums for location in each.locations}
        self.provisional, self.fixed = provisional, fixed
        layers = [layer_of(model, fusion) for fusion in fusions]
        trained = [trained_parameter(m, f.parameter) for m, f in zip(layers, fusions, strict=True)]
        self.by_key = {id(weight): f for weight, f in zip(trained, fusions, strict=True)}
        pairs = zip(layers, fusions, strict=True)
        self.marked = {f.name for m, f in pairs if counts_as_equalized(m, f)}
        self.moments = {f.name: _moments(f) for f in fusions}
        self.moments |= {each.name: [Moments() for _ in each.sources] for each in sums}
        self._summands: dict[str, list[Tensor]] = {}
        self.excluded = exclude
        self.reached: set[str] = set()
        self.takers: set[str] = set()

    def states(self) -> Tensor:
        """(branches and summands, 3), float64: one row for each, in the order of the plan."""
        rows = [moments.state for group in self.moments.values() for moments in group]
        return torch.stack([row.to(rows[0].device) for row in rows])

    def consume(self, call: Call) -> Tensor | None:
        """Measure the branches; run the layer with its weight scaled."""
        fusion = self.by_key.get(call.key)
        if fusion is None:
            if looks_joined(call, self.log) and not matches(call.module, self.excluded):
                self.takers.add(call.module)
            return None
        self.reached.add(fusion.name)
        self._require_same_joins(fusion, call)
        moments = self.moments[fusion.name]
        for moment, branch in zip(moments, fusion.branches, strict=True):
            moment.update(call.values.narrow(call.dim, branch.start, branch.width))
        scales = self._scales(fusion, moments, call)
        return (
            None if scales is None else call.run(weight=scaled_weight(call.weight, fusion, scales))
        )

    def _scales(
        self, fusion: Fusion, moments: Sequence[Moments], call: Call
    ) -> tuple[float, ...] | None:
        if self.fixed is not None and fusion.name in self.fixed:
            return None
        if self.provisional is not None:
            return self.provisional.get(fusion.name)
        stds = [moment.std for moment in moments]
        if self.fixed is not None and (
            fusion.name in self.marked or looks_equalized(call.weight, fusion, stds)
        ):
            self.fixed.add(fusion.name)
            return None
        return tuple(inverse(moment.mean, moment.std) for moment in moments)

    def _require_same_joins(self, fusion: Fusion, call: Call) -> None:
        joins = (self.log.joins[number] for number in call.note.joins)
        now = {join.widths for join in joins if not join.is_writing}
        known = set(fusion.joined)
        alike = not known or not now or known <= now or now <= known
        if not alike or call.input.shape[call.dim] != fusion.in_channels:
            widths = [branch.width for branch in fusion.branches]
            raise ScaleEqualizationError(
                f"{fusion.name} was called on an input that is not the concatenation it was found "
                f"with (branches of {widths} channels); exclude it by "
                f"exclude=({fusion.name!r}, ...)"
            )

    def adding(
        self, location: SumLocation, operands: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Measure the summands; with provisional scales, add them scaled."""
        found = self.sums.get(location)
        if found is None:
            return operands
        for index, tensor in zip(found.summands_at(location), operands, strict=True):
            if index is not None:
                self.moments[found.name][index].update(tensor)
                if self.provisional is None:
                    self._summands.setdefault(found.name, []).append(tensor.clone())
        factors = (self.provisional or {}).get(found.name)
        return operands if factors is None else scaled_summands(found, location, operands, factors)

    def added(
        self, location: SumLocation, operands: tuple[Tensor, Tensor], total: Tensor, fuses: bool
    ) -> Tensor:
        """Without provisional scales: add the summands anew, scaled, when all are known."""
        found = self.sums.get(location)
        if found is None or self.provisional is not None or location != found.locations[-1]:
            return total
        factors = balance(found, [varying_std(m) for m in self.moments[found.name]])
        summands = self._summands.pop(found.name)
        return reduce(add, (t * a for t, a in zip(summands, factors, strict=True)))


def scaled_summands(
    fusion: SumFusion,
    location: SumLocation,
    operands: tuple[Tensor, Tensor],
    factors: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """The two operands of an addition, those of them that are summands multiplied."""
    indices = fusion.summands_at(location)
    scales = (1.0 if index is None else factors[index] for index in indices)
    first, second = (t if a == 1.0 else t * a for t, a in zip(operands, scales, strict=True))
    return first, second


def _moments(fusion: Fusion) -> list[Moments]:
    """One for each slice; slices of the same map, as a channel shuffle leaves them, share theirs.

    The paper's scale belongs to a branch: a slice of its own for each channel would equalize
    channels instead.
    """
    shared: dict[int, Moments] = {}
    alone = (
        (-1 - i) if b.feature_map is None else b.feature_map for i, b in enumerate(fusion.branches)
    )
    return [shared.setdefault(number, Moments()) for number in alone]


def inverse(mean: float, std: float) -> float:
    """1 / std; 1 for a constant branch, which has no scale of its own."""
    return 1.0 if is_constant(mean, std) else 1.0 / std
