"""What is going to be measured and changed: found on the first batch, agreed on by all ranks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from .batches import find_input
from .finding import examine, require_fusions
from .fusion import Findings, Fusion, Refusal, ScaleEqualizationError
from .options import Options
from .ranks import gather, together
from .sums import SumFusion, find_edge_sums, find_sums

Run = Callable[[nn.Module, Any], Any]
SMALL = 2  # samples that are enough to find fusions


@dataclass(frozen=True)
class Plan:
    """What is going to be done.

    Attributes:
        run: Runs the network on a batch: ``run(model, batch)``.
        exclude: Patterns of what is left alone.
        findings: Fusions by concatenation, and what was refused.
        sums: Sum fusions, if they were asked for.
    """

    run: Run
    exclude: Sequence[str]
    findings: Findings
    sums: tuple[SumFusion, ...] = ()

    @property
    def fusions(self) -> tuple[Fusion, ...]:
        """Those to be measured."""
        return self.findings.fusions

    def require_something(self) -> None:
        """Raise NoFusionError if there is nothing to do."""
        if not self.sums:
            require_fusions(self.findings)

    def without(self, refusals: Sequence[Refusal]) -> Plan:
        """The plan without some fusions."""
        names = {refusal.name for refusal in refusals}
        kept = tuple(fusion for fusion in self.fusions if fusion.name not in names)
        more = (*self.findings.refusals, *refusals)
        return replace(self, findings=replace(self.findings, fusions=kept, refusals=more))


def default_run(model: nn.Module, batch: Any) -> Any:
    """From a batch to the network's output, if nobody says how."""
    return model(find_input(batch))


def first_and_all(batches: Iterable[Any]) -> tuple[list[Any], Iterator[Any]]:
    """The first batch, in a list that is empty if there is none; and all, with the first.

    Raises:
        ScaleEqualizationError: No rank has a batch.
    """
    stream = iter(batches)
    first = list(itertools.islice(stream, 1))
    if not any(gather(len(first))):
        raise ScaleEqualizationError("no batch to calibrate on: the batches are empty")
    return first, itertools.chain(first, stream)


def make_plan(
    model: nn.Module,
    first: Sequence[Any],
    options: Options,
    forward: Run | None,
    fusions: Sequence[Fusion] | None,
) -> Plan:
    """Find everything on the first batch; `first` is empty on a rank without batches."""
    run = forward or default_run

    def find() -> Found | None:
        return _find(model, first[0], options, run, fusions) if first else None

    findings, added = _agreed(gather(together(find)))
    if added:
        names = {each.location[0] for each in added}
        others = tuple(r for r in findings.refusals if r.name not in names)
        findings = replace(findings, refusals=others)
    return Plan(run, options.exclude, findings, added)


Found = tuple[Findings, tuple[SumFusion, ...]]


def _find(
    model: nn.Module, batch: Any, options: Options, run: Run, fusions: Sequence[Fusion] | None
) -> Found:
    include, exclude = options.include, options.exclude

    def find_on(part: Any) -> Found:
        def forward() -> Any:
            return run(model, copied(part))

        found = Findings(tuple(fusions or ()))
        if fusions is None:
            found = examine(model, forward, include=include, exclude=exclude)
        taken = {fusion.name for fusion in found.fusions}
        if not options.sums:
            return found, ()
        weighted, refusals = find_edge_sums(model, forward, exclude, options.force)
        found = replace(found, refusals=(*found.refusals, *refusals))
        return found, (*find_sums(model, forward, exclude, taken, options.force), *weighted)

    small = shrunk(batch)
    if small is None:
        return find_on(batch)
    try:
        return find_on(small)
    except Exception:  # whatever a network has against two samples
        return find_on(batch)


def _agreed(found: Sequence[Found | None]) -> Found:
    """What every rank that has batches found alike; the rest is refused."""
    mine = [each for each in found if each is not None]
    findings, sums = mine[0]
    everywhere = [f for f in findings.fusions if all(f in other.fusions for other, _ in mine)]
    somewhere = dict.fromkeys(f.name for other, _ in mine for f in other.fusions)
    alike = {fusion.name for fusion in everywhere}
    reason = "the ranks found it differently on their first batches; give them alike batches first"
    refusals = [*findings.refusals, *(Refusal(n, reason) for n in somewhere if n not in alike)]
    agreed = replace(findings, fusions=tuple(everywhere), refusals=tuple(refusals))
    return agreed, tuple(s for s in sums if all(s in other for _, other in mine))


def copied(batch: Any) -> Any:
    """The batch with tensors of its own: a network may write into its input."""
    return tree_map(_copied, batch)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    with suppress(Exception):  # containers of other people's; what has no copy is shared
        return copy.deepcopy(leaf)
    return leaf


def shrunk(batch: Any) -> Any:
    """The batch with its first few samples; None if it is not a batch of that kind."""
    tensors = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[0] for tensor in tensors if tensor.dim()}
    if len(sizes) != 1 or min(sizes) <= SMALL or any(t.dim() == 0 for t in tensors):
        return None
    if any(tensor.dim() < 2 for tensor in tensors) and len(tensors) == 1:
        return None
    return tree_map_only(Tensor, lambda tensor: tensor[:SMALL], batch)
