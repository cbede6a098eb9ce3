"""Measures every branch's scale over the training data: Algorithm 1 of the paper, in one pass.

Nested fusions (a fusion whose output reaches another one) must be measured with the upstream ones
already equalized. While watching, each consumer is therefore handed its weight divided by
provisional scales. These come from the first batch alone: at each consumer its own branches are
measured before it runs, so one pass settles all levels. From then on they are fixed, so every
batch contributes independently of all others, and the result does not depend on the order of
batches or the number of ranks. If the first batch was misleading, which shows after a few more,
measuring starts again from the scales found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .batches import find_input
from .folding import scaled_weight
from .fusion import Findings, Fusion, ScaleEqualizationError
from .report import Measure, Report
from .state import calibrating
from .statistics import Moments, pool, precision
from .tracer import Call, Tracer, weight_key
from .tracing import DEFAULT_EXCLUDE, examine, require_fusions, unwrap

CHECK_EVERY = 8  # batches over all ranks between two looks at the precision
MAX_ROUNDS = 3
FAR_APART = 30.0

Scales = dict[str, tuple[float, ...]]


def measure_scales(
    model: nn.Module,
    batches: Iterable[Any],
    fusions: Sequence[Fusion] | None = None,
    *,
    forward: Callable[[Any], Any] | None = None,
    tolerance: float = 0.01,
    max_batches: int | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    progress: Callable[[int], Any] | None = None,
) -> Report:
    """Measure mean and standard deviation of every branch of every fusion; change nothing.

    With torch.distributed initialized, every rank calls this with batches of its own and all get
    the same report.

    Args:
        model: The network at its initialization.
        batches: Training batches on the model's device; a loader, list or generator.
        fusions: From `find_fusions`; None finds them on the first batch.
        forward: Runs the network on one batch; default ``model(find_input(batch))``.
        tolerance: Stop when every std is known this well (relative, 95 % confidence); 0 uses
            every batch.
        max_batches: At most so many batches of this process.
        include: Patterns of consumers to take, if fusions are to be found.
        exclude: Patterns of consumers to leave alone.
        progress: Called with the number of batches done after each.

    Raises:
        NoFusionError: There is nothing to equalize.
        ScaleEqualizationError: No batch, a branch that is not finite, or a fusion never reached.
    """
    model = unwrap(model)
    run = forward or (lambda batch: model(find_input(batch)))
    first, stream = _peek(batches)
    findings = Findings(tuple(fusions or ()))
    if fusions is None:
        findings = examine(model, lambda: run(first), include=include, exclude=exclude)
        require_fusions(findings)
    survey = _Survey(model, findings.fusions, run, tolerance, max_batches, progress, exclude)
    table = survey.measure(first, stream, batches)
    return _report(findings, table, survey.lone_norms)


@dataclass
class _Survey:
    """Everything one measurement needs at hand."""

    model: nn.Module
    fusions: tuple[Fusion, ...]
    run: Callable[[Any], Any]
    tolerance: float
    max_batches: int | None
    progress: Callable[[int], Any] | None
    exclude: Sequence[str] = DEFAULT_EXCLUDE
    lone_norms: int = 0

    def measure(self, first: Any, stream: Iterator[Any], batches: Iterable[Any]) -> Tensor:
        """The table of all batches of all ranks, float64, (batches, branches, 3)."""
        nested = any(fusion.upstream for fusion in self.fusions)
        provisional = self._settle(first) if nested else {}
        once = iter(batches) is batches  # a generator: start again with what is left of it
        table = self._round(stream, provisional, may_stop=True)
        for _ in range(MAX_ROUNDS - 1):
            found = _scales(self.fusions, pool(table))
            if not self._drifted(provisional, found):
                break
            provisional, stream = found, stream if once else iter(batches)
            again = self._round(stream, provisional)
            if not len(again):
                break
            table = again
        return table

    def _settle(self, batch: Any) -> Scales:
        """Scales at which all levels are in equilibrium on one batch; rank 0's on all ranks."""
        watch = _Watch(self.model, self.fusions, live=True)
        self._pass(watch, batch)
        table = torch.stack(watch.history)
        if _world_size() > 1:
            distributed.broadcast(table, src=0)
        return _scales(self.fusions, pool(table))

    def _pass(self, watch: _Watch, batch: Any) -> None:
        tracer = Tracer(self.model, watch.consume, self.exclude)
        with calibrating(self.model), tracer.watching():
            self.run(batch)
        self.lone_norms += tracer.trace.lone_norms
        watch.close_batch()

    def _round(self, stream: Iterator[Any], provisional: Scales, may_stop: bool = False) -> Tensor:
        """One pass over the batches; with `may_stop`, given up when its scales prove wrong."""
        watch = _Watch(self.model, self.fusions, provisional)
        stream = itertools.islice(stream, self.max_batches)
        block = math.ceil(CHECK_EVERY / _world_size())
        while True:
            before = len(watch.history)
            for batch in itertools.islice(stream, block):
                self._pass(watch, batch)
                if self.progress:
                    self.progress(len(watch.history))
            table, ended = gather_tables(watch.table(), len(watch.history) < before + block)
            if ended or self._is_known(table):
                return table
            if may_stop and self._drifted(provisional, _scales(self.fusions, pool(table))):
                return table

    def _is_known(self, table: Tensor) -> bool:
        if not self.tolerance or len(table) < CHECK_EVERY:
            return False
        return bool((precision(table) <= self.tolerance).all())

    def _drifted(self, provisional: Scales, found: Scales) -> bool:
        """Whether the provisional scales were too far off for what was measured behind them.

        A normalization behind an upstream fusion leaves only the second order of such an error.
        """
        inner = {name for fusion in self.fusions for name in fusion.upstream}
        for fusion in self.fusions:
            if fusion.name not in inner or not provisional:
                continue
            allowed = max(self.tolerance, 0.01) * (5.0 if fusion.norm else 0.5)
            pairs = zip(provisional[fusion.name], found[fusion.name], strict=True)
            if any(abs(math.log(b / a)) > allowed for a, b in pairs):
                return True
        return False


@dataclass
class _Watch:
    """Takes the moments of every branch at every call of a consumer."""

    model: nn.Module
    fusions: tuple[Fusion, ...]
    provisional: Scales = field(default_factory=dict)
    live: bool = False
    history: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.by_weight = {weight_key(self.model, f): f for f in self.fusions}
        self._open_batch()

    def _open_batch(self) -> None:
        self.moments = {f.name: [Moments() for _ in f.branches] for f in self.fusions}

    def close_batch(self) -> None:
        """Keep the batch's moments as one (branches, 3) tensor."""
        states = [m.state for f in self.fusions for m in self.moments[f.name]]
        home = states[0].device
        self.history.append(torch.stack([state.to(home) for state in states]))
        self._open_batch()

    def table(self) -> Tensor:
        """All batches so far, (batches, branches, 3)."""
        if self.history:
            return torch.stack(self.history)
        return torch.zeros(0, sum(len(f.branches) for f in self.fusions), 3, dtype=torch.float64)

    def consume(self, call: Call) -> Tensor | None:
        fusion = self.by_weight.get(call.key)
        if fusion is None:
            return None
        moments = self.moments[fusion.name]
        for moment, values in zip(moments, _branch_values(fusion, call), strict=True):
            moment.update(values)
        scales = self.provisional.get(fusion.name)
        if self.live:
            scales = tuple(_inverse(moment.mean, moment.std) for moment in moments)
        return None if scales is None else scaled_weight(call.weight, fusion, scales)


def _branch_values(fusion: Fusion, call: Call) -> Iterator[Tensor]:
    layout = call.layout
    widths = [branch.width for branch in fusion.branches]
    if layout is None or [width for _, width in layout.runs] != widths:
        raise ScaleEqualizationError(
            f"{fusion.name} was called on an input that is not the concatenation it was found "
            f"with (branches of {widths} channels); exclude it by exclude=({fusion.name!r}, ...)"
        )
    for branch, (index, _) in zip(fusion.branches, layout.runs, strict=True):
        values = layout.parts[index].values()
        if values is None:  # overwritten in place since: what arrives is what counts
            values = call.values.narrow(layout.dim, branch.start, branch.width)
        yield values


def _inverse(mean: float, std: float) -> float:
    """1 / std; 1 for a constant branch, which has no scale of its own."""
    return 1.0 if is_constant(mean, std) else 1.0 / std


def is_constant(mean: float, std: float) -> bool:
    """Whether a branch varies no more than by rounding."""
    return std <= 1e-6 * abs(mean) + 1e-30


def _scales(fusions: Sequence[Fusion], states: Tensor) -> Scales:
    rows = iter(states.tolist())
    found: Scales = {}
    for fusion in fusions:
        moments = [_moments(next(rows)) for _ in fusion.branches]
        found[fusion.name] = tuple(_inverse(m.mean, m.std) for m in moments)
    return found


def _moments(state: list[float]) -> Moments:
    return Moments.from_state(torch.tensor(state, dtype=torch.float64))


def _report(findings: Findings, table: Tensor, lone_norms: int) -> Report:
    states, spread = pool(table), precision(table).tolist()
    rows = iter(zip(states.tolist(), spread, strict=True))
    measures = tuple(
        tuple(_measure(fusion, index, *next(rows)) for index in range(len(fusion.branches)))
        for fusion in findings.fusions
    )
    note = (
        f"{lone_norms} batch normalizations saw one value per channel (batch size 1, pooled to "
        "1x1), which training refuses; they were normalized over their channels to measure",
    )
    notes = note if lone_norms else ()
    return Report(
        findings.fusions,
        measures,
        findings.refusals,
        notes=notes + tuple(_far_apart(findings.fusions, measures)),
        batches=len(table),
    )


def _far_apart(fusions: Sequence[Fusion], measures: Sequence[Sequence[Measure]]) -> Iterator[str]:
    """Remarks on fusions whose branches differ so much that one should look at them."""
    for fusion, group in zip(fusions, measures, strict=True):
        scales = [measure.scale for measure in group if not measure.note]
        if scales and max(scales) > FAR_APART * min(scales):
            ratio = max(scales) / min(scales)
            yield (
                f"{fusion.name}: its branches differ {ratio:.0f}-fold in scale; one that is meant "
                "to start small (a token, a gate) is better left out by exclude"
            )


def _measure(fusion: Fusion, index: int, state: list[float], spread: float) -> Measure:
    moments = _moments(state)
    place = f"branch {index} of {fusion.name}"
    if not moments.count:
        raise ScaleEqualizationError(f"{place} was never reached by the batches given")
    if not all(math.isfinite(value) for value in state):
        raise ScaleEqualizationError(
            f"{place} is not finite (mean {moments.mean}, std {moments.std}): in float16 it "
            "overflowed; calibrate in float32 or bfloat16, or look for the NaN in the data"
        )
    constant = is_constant(moments.mean, moments.std)
    return Measure(
        moments.mean,
        moments.std,
        _inverse(moments.mean, moments.std),
        moments.count,
        spread if math.isfinite(spread) else 0.0,
        "constant: left as it is" if constant else "",
    )


def _peek(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    stream = iter(batches)
    try:
        first = next(stream)
    except StopIteration:
        raise ScaleEqualizationError("no batch to calibrate on: the batches are empty") from None
    return first, itertools.chain([first], stream)


def _world_size() -> int:
    active = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if active else 1


def gather_tables(table: Tensor, ended: bool) -> tuple[Tensor, bool]:
    """All ranks' tables, interleaved by batch, and whether every rank has run out of batches."""
    world = _world_size()
    if world == 1:
        return table, ended
    facts = [torch.zeros(2, dtype=torch.int64, device=table.device) for _ in range(world)]
    distributed.all_gather(facts, torch.tensor([len(table), ended], device=table.device))
    longest = max(int(fact[0]) for fact in facts)
    padded = table.new_zeros(longest, *table.shape[1:])
    padded[: len(table)] = table
    tables = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(tables, padded)
    joined = torch.stack(tables, dim=1).flatten(0, 1)
    return joined[joined[..., 0].sum(dim=1) > 0], all(bool(fact[1]) for fact in facts)
