"""Sum fusion: where branches are added (FPN, LinkNet) the scale is pushed back into the producer.

A sum has no slice of its own for each branch. But a normalization or convolution whose output
reaches the sum through operations with f(a x) = a f(x) only, and reaches nothing else, can be
scaled instead: its weight and bias times a. The paper fuses by concatenation, so this is ours, and
off unless asked for.

Every summand that can be scaled is brought to the scale of the one that cannot, as it is in an FPN
whose top-down path feeds other outputs too; if all can, to their root mean square, so that the sum
keeps its variance as if the summands were independent. Sums of more than two maps are taken as
pairs, in the order they are added in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adding import Place, SumFinder, SumFusion, SumWatcher
from .folding import mark_changed, refuse_changed
from .fusion import ScaleEqualizationError
from .measuring import CHECK_EVERY, gather_tables
from .patterns import DEFAULT_EXCLUDE
from .report import Summand, SumMeasure
from .state import calibrating
from .statistics import Moments, pool, precision


@dataclass(eq=False)
class _Meter:
    """Moments of the summands of known sums, batch by batch, the earlier sums scaled already."""

    fusions: tuple[SumFusion, ...]
    provisional: dict[Place, tuple[float, float]] = field(default_factory=dict)
    history: list[Tensor] = field(default_factory=list)

    def watch(self, model: nn.Module, exclude: Sequence[str], run: Callable[[], Any]) -> None:
        """One forward pass."""
        scaler = _Scaler(model, exclude, self)
        with calibrating(model), scaler.watching():
            run()
        states = [m.state for f in self.fusions for m in scaler.moments[f.place]]
        self.history.append(torch.stack([state.to(states[0].device) for state in states]))


class _Scaler(SumWatcher):
    """Measures summands and adds them scaled, as they will be once their producers are."""

    def __init__(self, model: nn.Module, exclude: Sequence[str], meter: _Meter) -> None:
        super().__init__(model, exclude)
        self.meter = meter
        self.known = {fusion.place: fusion for fusion in meter.fusions}
        self.moments = {place: (Moments(), Moments()) for place in self.known}

    def _adding(self, place: Place, args: Sequence[Any]) -> Sequence[Any]:
        fusion = self.known.get(place)
        if fusion is None:
            return args
        moments = self.moments[place]
        for moment, tensor in zip(moments, args, strict=False):
            moment.update(tensor)
        factors = self.meter.provisional.get(place)
        if factors is None:
            factors = _factors(fusion, [moment.std for moment in moments])
        return (args[0] * factors[0], args[1] * factors[1], *args[2:])


def equalize_sums_(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    *,
    tolerance: float,
    max_batches: int | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    apply: bool = True,
    force: bool = False,
) -> tuple[SumMeasure, ...]:
    """Bring the summands of every sum fusion to one scale, by scaling their producers in place.

    Args:
        model: The network at its initialization.
        batches: Can be iterated more than once.
        run: Runs the network on one batch.
        tolerance: As in `measure_scales`.
        max_batches: As in `measure_scales`.
        exclude: Patterns of modules that are left alone.
        apply: Change the producers; False measures only.
        force: Scale producers too that were equalized before.

    Returns:
        One measure for each sum, also of those with no producer that could be scaled.
    """
    if iter(batches) is batches:
        raise ScaleEqualizationError(
            "sums=True reads the batches twice: give a list or a loader instead of a generator"
        )
    first = next(iter(batches), None)
    if first is None:
        raise ScaleEqualizationError("no batch to calibrate on: the batches are empty")
    finder = SumFinder(model, exclude)
    with calibrating(model), finder.watching():
        run(first)
    fusions = finder.fusions()
    if not fusions:
        return ()
    table = _measure(model, fusions, batches, run, tolerance, max_batches, exclude)
    measures = _describe(fusions, pool(table).tolist())
    if apply:
        _scale_producers(model, measures, force)
    return measures


def _measure(
    model: nn.Module,
    fusions: tuple[SumFusion, ...],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    tolerance: float,
    max_batches: int | None,
    exclude: Sequence[str],
) -> Tensor:
    """The table of all batches of all ranks, (batches, 2 x sums, 3), float64."""
    settle = _Meter(fusions)
    settle.watch(model, exclude, partial(run, next(iter(batches))))
    table = torch.stack(settle.history)
    first = _describe(fusions, pool(gather_tables(table, True)[0]).tolist())
    factors = {
        f.place: (m.summands[0].scale, m.summands[1].scale)
        for f, m in zip(fusions, first, strict=True)
    }
    meter, stream = _Meter(fusions, factors), itertools.islice(iter(batches), max_batches)
    while True:
        n_before = len(meter.history)
        for batch in itertools.islice(stream, CHECK_EVERY):
            meter.watch(model, exclude, partial(run, batch))
        ended = len(meter.history) < n_before + CHECK_EVERY
        table, ended = gather_tables(torch.stack(meter.history), ended)
        if ended or (tolerance and bool((precision(table) <= tolerance).all())):
            return table


def _describe(
    fusions: Sequence[SumFusion], states: Sequence[Sequence[float]]
) -> tuple[SumMeasure, ...]:
    rows = iter(states)
    measures = []
    for fusion in fusions:
        pair = [Moments.from_state(torch.tensor(next(rows), dtype=torch.float64)) for _ in "ab"]
        factors = _factors(fusion, [moments.std for moments in pair])
        summands = tuple(
            Summand(source, producer, moments.mean, moments.std, factor, moments.count)
            for source, producer, moments, factor in zip(
                fusion.sources, fusion.producers, pair, factors, strict=True
            )
        )
        measures.append(SumMeasure(fusion.place[0], summands))
    return tuple(measures)


def _factors(fusion: SumFusion, stds: Sequence[float]) -> tuple[float, float]:
    """What each summand is multiplied by."""
    fixed = [std for std, producer in zip(stds, fusion.producers, strict=True) if not producer]
    if len(fixed) == 2 or min(stds) <= 0.0:
        return 1.0, 1.0
    target = fixed[0] if fixed else math.sqrt((stds[0] ** 2 + stds[1] ** 2) / 2)
    first, second = (
        target / std if producer else 1.0
        for std, producer in zip(stds, fusion.producers, strict=True)
    )
    return first, second


def _scale_producers(model: nn.Module, measures: Sequence[SumMeasure], force: bool) -> None:
    """Change all producers, or none if one of them was changed before."""
    jobs = [s for measure in measures for s in measure.summands if s.producer and s.scale != 1.0]
    layers = [(summand, model.get_submodule(summand.producer)) for summand in jobs]
    for summand, layer in layers:
        refuse_changed(summand.producer, layer, force)
    with torch.no_grad():
        for summand, layer in layers:
            for name in ("weight", "bias"):
                values = getattr(layer, name, None)
                if isinstance(values, Tensor):
                    values.mul_(summand.scale)
            mark_changed(layer)
