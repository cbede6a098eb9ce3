"""Measures every branch's scale over the training data: Algorithm 1 of the paper, in one pass.

What is measured is what a layer takes: the channels of its input that belong to a branch, or the
two maps of a sum. Nested fusions must be measured with the upstream ones already equalized. While
watching, each layer is therefore handed its weight divided by provisional scales. These come from
the first batch alone: at each layer its own branches are measured before it runs, so one pass
settles all levels. From then on they are fixed, so every batch contributes independently of all
others, and the result does not depend on the order of batches or the number of ranks. If the first
batch was misleading, which shows after a few more, measuring starts again from the scales found: a
chain without normalization settles level by level.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .finding import DEFAULT_EXCLUDE
from .fusion import Fusion, ScaleEqualizationError
from .layers import unwrap
from .moments_observer import MomentsObserver, Scales, inverse
from .options import Options
from .planning import Plan, Run, copied, first_and_all, make_plan
from .ranks import gather, gather_tables, together, world_size
from .report import Measure, Report
from .snapshots import as_before, same_random_streams
from .state import calibrating
from .statistics import Moments, is_constant, pool, precision, varying_std
from .sums import balance, describe_sums

CHECK_EVERY = 8  # batches over all ranks between two looks at the precision
SPARE_ROUNDS = 2  # beside one for each level of nesting
FAR_APART = 30.0


def measure_scales(
    model: nn.Module,
    batches: Iterable[Any],
    fusions: Sequence[Fusion] | None = None,
    *,
    forward: Run | None = None,
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
        forward: Runs the network on one batch, ``forward(model, batch)``; default
            ``model(find_input(batch))``.
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
    options = Options(
        mode="off", tolerance=tolerance, max_batches=max_batches, include=include, exclude=exclude
    )
    model = unwrap(model)
    with reading(model, batches):
        first, stream = first_and_all(batches)
        plan = make_plan(model, first, options, forward, fusions)
        plan.require_something()
        return Measurement(model, plan, options, progress).report(first, stream, batches)


@contextmanager
def reading(model: nn.Module, batches: Iterable[Any]) -> Iterator[None]:
    """Random streams, and what batches are drawn by (generators, counts), as before on leaving."""
    own = {id(module) for module in model.modules()}
    with same_random_streams(), as_before(batches, but=own):
        yield


@dataclass
class Measurement:
    """One measurement of everything in a plan.

    Attributes:
        fixed: Names of fusions that prove to be equalized already; they are run as they are.
        last: The last batch that was measured, if there was one; of those that ran most fusions.
        single_value_norms: Batch normalizations that had one value per channel.
        later: Modules that took joined maps, though not on the batch that fusions were found on.
        reached: How many fusions the batch in `last` ran.
        unsettled: Fusions whose scales still changed in the last round.
    """

    model: nn.Module
    plan: Plan
    options: Options
    progress: Callable[[int], Any] | None = None
    fixed: set[str] = field(default_factory=set)
    last: list[Any] = field(default_factory=list)
    single_value_norms: int = 0
    later: set[str] = field(default_factory=set)
    reached: int = 0
    unsettled: list[str] = field(default_factory=list)

    def report(self, first: Sequence[Any], stream: Iterator[Any], batches: Iterable[Any]) -> Report:
        """Measure; the random streams go on from batch to batch, and are as before at the end."""
        with calibrating(self.model):
            table = self._measure(first, stream, batches)
        return self._described(table)

    def _measure(
        self, first: Sequence[Any], stream: Iterator[Any], batches: Iterable[Any]
    ) -> Tensor:
        """The table of all batches of all ranks, float64, (batches, rows, 3)."""
        nested = any(fusion.upstream for fusion in self.plan.fusions) or bool(self.plan.sums)
        provisional = self._settle(first) if nested else {}
        once = iter(batches) is batches  # a generator: start again with what is left of it
        table = self._round(stream, provisional, may_stop=True)
        # Without a normalization in between, a level is right in the round after the one above it.
        for _ in range(_depth(self.plan.fusions) + len(self.plan.sums) + SPARE_ROUNDS - 1):
            found = self._scales(table)
            if not self._drifted(provisional, found):
                break
            # The same samples in each round: what they leave to chance is no drift then.
            with nullcontext() if once else reading(self.model, batches):
                again = self._round(stream if once else iter(batches), found)
            if not len(again):
                break
            provisional, table = found, again
        self.unsettled = self._drifted(provisional, self._scales(table))
        return table

    def _settle(self, first: Sequence[Any]) -> Scales:
        """Scales at which all levels are in equilibrium on one rank's first batch; for all."""
        src = next(rank for rank, n in enumerate(gather(len(first))) if n)

        def measure() -> Tensor:
            return self._pass(first[0], None) if first else self._blank()

        state = together(measure)
        if world_size() > 1:
            distributed.broadcast(state, src=src)
            self.fixed = gather(self.fixed)[src]
        return self._scales(state[None])

    def _blank(self) -> Tensor:
        n = sum(len(f.branches) for f in self.plan.fusions)
        n += sum(len(each.sources) for each in self.plan.sums)
        return torch.zeros(n, 3, dtype=torch.float64, device=self._home())

    def _home(self) -> torch.device:
        parameter = next(self.model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        return torch.device("cpu") if device.type == "mps" else device

    def _pass(self, batch: Any, provisional: Scales | None) -> Tensor:
        plan = self.plan
        observer = MomentsObserver(
            self.model,
            plan.exclude,
            plan.fusions,
            plan.sums,
            provisional,
            None if self.options.force else self.fixed,
        )
        with observer.watching():
            plan.run(self.model, copied(batch))
        self.single_value_norms += observer.log.single_value_norms
        if plan.findings.takers is not None:
            self.later |= observer.takers - plan.findings.takers
        if provisional is not None and len(observer.reached) >= self.reached:
            self.last[:], self.reached = [batch], len(observer.reached)
        return observer.states().to(self._home())

    def _round(self, stream: Iterator[Any], provisional: Scales, may_stop: bool = False) -> Tensor:
        """One pass over the batches; with `may_stop`, given up when its scales prove wrong."""
        history: list[Tensor] = []
        stream = itertools.islice(stream, self.options.max_batches)
        size = math.ceil(CHECK_EVERY / world_size())

        def block() -> None:
            for batch in itertools.islice(stream, size):
                history.append(self._pass(batch, provisional))
                if self.progress:
                    self.progress(len(history))

        while True:
            before = len(history)
            together(block)
            mine = torch.stack(history) if history else self._blank()[None][:0]
            table, ended = gather_tables(mine, len(history) < before + size)
            if ended or self._is_known(table):
                return table
            if may_stop and self._drifted(provisional, self._scales(table)):
                return table

    def _is_known(self, table: Tensor) -> bool:
        if not self.options.tolerance or len(table) < CHECK_EVERY:
            return False
        return bool((precision(table) <= self.options.tolerance).all())

    def _scales(self, table: Tensor) -> Scales:
        rows = iter(pool(table))
        found: Scales = {}
        for fusion in self.plan.fusions:
            moments = [Moments.from_state(next(rows)) for _ in fusion.branches]
            found[fusion.name] = tuple(inverse(m.mean, m.std) for m in moments)
        for each in self.plan.sums:
            stds = [varying_std(Moments.from_state(next(rows))) for _ in each.sources]
            found[each.name] = balance(each, stds)
        return found

    def _drifted(self, provisional: Scales, found: Scales) -> list[str]:
        """Names of those whose provisional scales were too far off for what is behind them.

        A normalization behind an upstream fusion leaves only the second order of such an error.
        """
        inner = {name for fusion in self.plan.fusions for name in fusion.upstream} - self.fixed
        slack = {f.name: 5.0 if f.norm else 0.5 for f in self.plan.fusions if f.name in inner}
        slack |= {each.name: 0.5 for each in self.plan.sums}
        drifted = []
        for name in sorted(slack.keys() & provisional.keys()):
            allowed = max(self.options.tolerance, 0.01) * slack[name]
            pairs = zip(provisional[name], found[name], strict=True)
            if any(a > 0 and b > 0 and abs(math.log(b / a)) > allowed for a, b in pairs):
                drifted.append(name)
        return drifted

    # -- the report ------------------------------------------------------------------------

    def _described(self, table: Tensor) -> Report:
        fusions, findings = self.plan.fusions, self.plan.findings
        states, spread = pool(table), precision(table).tolist()
        n = sum(len(fusion.branches) for fusion in fusions)
        rows = iter(zip(states.tolist(), spread, strict=True))
        measures = tuple(
            tuple(_measure(fusion, index, *next(rows)) for index in range(len(fusion.branches)))
            for fusion in fusions
        )
        note = (
            f"{self.single_value_norms} batch normalizations saw one value per channel (batch size "
            "1, pooled to 1x1), which training refuses; they were normalized over their channels "
            "to measure",
        )
        return Report(
            fusions,
            measures,
            findings.refusals,
            notes=(
                *findings.notes,
                *(note if self.single_value_norms else ()),
                *_far_apart(fusions, measures),
                *_blank(fusions, measures),
                *self._later_only(),
                *self._not_settled(),
            ),
            batches=len(table),
            sums=describe_sums(self.plan.sums, states[n:]),
        )

    def _not_settled(self) -> Iterator[str]:
        """A remark on scales that depend on themselves, or on batches that were read once only."""
        if self.unsettled:
            yield (
                f"the scales of {', '.join(self.unsettled)} did not settle: what is behind them (a "
                "recurrence: they themselves) was measured at others; give batches that can be "
                "read again, or leave them out by exclude=(...)"
            )

    def _later_only(self) -> Iterator[str]:
        """Remarks on layers that the first batch did not show to take joined maps."""
        for name in sorted(set().union(*gather(self.later))):
            yield (
                f"{name or 'the model'} takes concatenated branches in later batches only; fusions "
                "are looked for on the first batch: it is left as it is"
            )


def _depth(fusions: Sequence[Fusion]) -> int:
    """Fusions in the longest chain of one behind the other; those that reach themselves once."""
    upstream = {fusion.name: set(fusion.upstream) for fusion in fusions}
    depth = 0
    while upstream:
        depth += 1
        first = {name for name, above in upstream.items() if not above & upstream.keys()}
        if not first:  # a recurrence: no order is right
            return depth
        upstream = {name: above for name, above in upstream.items() if name not in first}
    return depth


def _blank(fusions: Sequence[Fusion], measures: Sequence[Sequence[Measure]]) -> Iterator[str]:
    """Remarks on channels that are no branch's."""
    for fusion, group in zip(fusions, measures, strict=True):
        for branch, measure in zip(fusion.branches, group, strict=True):
            if branch.blank and measure.note:
                yield (
                    f"{fusion.name}: no branch fills its input channels {branch.start}:"
                    f"{branch.stop}, which are {measure.mean:g}: they have no scale of their own"
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
    moments = Moments.from_state(torch.tensor(state, dtype=torch.float64, device="cpu"))
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
        inverse(moments.mean, moments.std),
        moments.count,
        spread if math.isfinite(spread) else 0.0,
        "constant: left as it is" if constant else "",
    )
