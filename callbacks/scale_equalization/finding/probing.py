"""Runs the network again with its joined maps multiplied by powers of two, and looks what arrives.

See the docstring of the room for why this proves something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scale_equalization.state import calibrating

from .calls import Call, Log
from .observer import Observer
from .probes import NOTHING, OddFactors, Origins, Part, Probe, Reference, is_broken

Watcher = TypeVar("Watcher", bound=Observer)

DEAD, INVALID, VARYING = -1, -2, -3  # kinds of channels without a label; 0 is "not touched"

CONSTANTS = (
    "constants lie among a branch's values (a padding with a value, an assignment), which no "
    "factor scales"
)
OTHER_PATH = "the network takes another path when its branches are multiplied"
UNSEEN = (
    "its input's channels are of several maps, put together in a way that is not followed: write "
    "it as torch.cat"
)
POWERS_ONLY = (
    "its input follows its branches in powers of two only: something between rounds to a few bits "
    "or treats mantissas by themselves"
)


@dataclass(eq=False)
class Arrival:
    """What one call of a linear layer showed.

    Attributes:
        call: The call of the reference run, without its tensors' contents.
        channels: Of its input.
        labels: For each group of joins, one number for each input channel: 1 + the part that it
            comes from, 0 for none of this group, or one of the kinds above.
        maps: For each group in which labels vary inside a channel, all labels, (channels, others).
        reasons: Why labels are invalid, from the runs in which they were.
        changed: Whether anything arrived changed at all.
    """

    call: Call
    channels: int
    labels: list[Tensor] = field(default_factory=list)
    maps: dict[int, Tensor] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    changed: bool = False


@dataclass(eq=False)
class Evidence:
    """Everything the runs have shown.

    Attributes:
        log: Of the reference run.
        arrivals: One for each call of a linear layer, in forward order.
        groups: For each group of joins, its parts in the order of their labels.
    """

    log: Log
    arrivals: list[Arrival]
    groups: list[list[Part]]


def gather_evidence(
    model: nn.Module,
    run: Callable[[], Any],
    exclude: Sequence[str],
    randomize: bool = True,
    training: bool = True,
) -> Evidence:
    """Run the network once for reference, once or more for each group of joins, and once for all.

    Args:
        model: The network.
        run: Runs it on one and the same batch.
        exclude: Patterns of modules that are left alone.
        randomize: Join random values in the place of the real ones, so that no channel is blank.
        training: Whether to run it as in training, or else in eval mode.
    """

    def watched(observer: Watcher) -> Watcher:
        with calibrating(model, training), observer.watching():
            run()
        return observer

    whole = randomize and training  # eval mode and real values are for what was found before
    reference = watched(Reference(model, exclude, randomize, whole))
    groups = _groups(reference)
    arrivals = {
        n: Arrival(r.call, r.input.shape[r.call.dim]) for n, r in reference.recorded.items()
    }
    base = 4 if torch.float16 in reference.dtypes else 20  # float16 has room for few powers
    for group, parts in enumerate(groups):
        runs = []
        for exponents in _exponents(parts, base):
            probe = watched(Probe(model, exclude, reference, exponents, base))
            runs.append(probe.arrived)
            reference.log.lost += probe.log.lost
        for number, arrival in arrivals.items():
            _read(arrival, group, [arrived.get(number) for arrived in runs], base)
    factors = _factors(groups)
    expected = {n: _expected(a, groups, factors) for n, a in arrivals.items() if a.changed}
    if expected and training:
        odd = watched(OddFactors(model, exclude, reference, factors, expected))
        for number in expected:
            _require_any_factor(arrivals[number], odd.wrong.get(number))
    if whole:
        origins = watched(Origins(model, exclude, reference, base))
        reference.log.lost += [(module, UNSEEN) for module in origins.found]
    kept = []
    for call, channels in reference.calls:
        arrival = arrivals.get(call.number, Arrival(call, channels))
        if reference.obstacles.get(call.number):
            arrival.reasons.append(reference.obstacles[call.number])
            arrival.changed = True
        kept.append(arrival)
    return Evidence(reference.log, kept, groups)


def differs_between_runs(model: nn.Module, run: Callable[[], Any], exclude: Sequence[str]) -> bool:
    """Whether two runs as alike as can be still differ at a linear layer."""
    first, second = (Reference(model, exclude, False) for _ in range(2))
    for reference in (first, second):
        with calibrating(model), reference.watching():
            run()
    pairs = ((r.input, second.recorded.get(n)) for n, r in first.recorded.items())
    return any(b is None or not torch.equal(a, b.input) for a, b in pairs)


def _groups(reference: Reference) -> list[list[Part]]:
    """The parts that are multiplied in the same run: those of joins of one depth."""
    joins = reference.log.joins
    by_depth: dict[int, list[Part]] = {}
    for part in reference.parts:
        by_depth.setdefault(joins[part[0]].depth, []).append(part)
    return [by_depth[depth] for depth in sorted(by_depth)]


def _exponents(parts: Sequence[Part], base: int) -> Iterator[dict[Part, int]]:
    """A power of two for each part in each run: its number's digits, base ... 2 base - 1."""
    digits = 1
    while base**digits < len(parts):
        digits += 1
    for place in range(digits):
        yield {part: base + (i // base**place) % base for i, part in enumerate(parts)}


def _factors(groups: Sequence[Sequence[Part]]) -> dict[Part, float]:
    """Numbers between 1.1 and 1.9 for all parts, neighbours far apart."""
    parts = [part for group in groups for part in group]
    return {part: 1.1 + 0.8 * ((i * 0.618) % 1.0) for i, part in enumerate(parts)}


def _expected(
    arrival: Arrival, groups: Sequence[Sequence[Part]], factors: Mapping[Part, float]
) -> Tensor:
    """What each input channel is multiplied by if its labels are right; NaN without labels."""
    total = torch.ones(arrival.channels, dtype=torch.float64, device="cpu")
    for parts, labels in zip(groups, arrival.labels, strict=True):
        values = [1.0, *(factors[part] for part in parts)]
        line = torch.tensor(values, dtype=torch.float64, device="cpu")
        total *= torch.where(labels >= 0, line[labels.clamp(min=0)], torch.nan)
    return total


def _require_any_factor(arrival: Arrival, wrong: Tensor | None) -> None:
    """Take the labels from channels that are proportional in powers of two only."""
    if wrong is not None and not bool(wrong.any()):
        return
    arrival.reasons.append(OTHER_PATH if wrong is None else POWERS_ONLY)
    for labels in arrival.labels:
        labels[(labels > 0) if wrong is None else wrong & (labels > 0)] = INVALID


def _read(
    arrival: Arrival,
    group: int,
    runs: Sequence[tuple[Tensor | None, str] | None],
    base: int,
) -> None:
    """One label for each input channel from the runs of one group."""
    labels = torch.zeros(channels := arrival.channels, dtype=torch.int64, device="cpu")
    maps, invalid = None, torch.zeros(channels, dtype=torch.bool, device="cpu")
    if any(run is None for run in runs):
        arrival.reasons.append(OTHER_PATH)
        arrival.changed = True
        arrival.labels.append(torch.full((channels,), INVALID, device="cpu"))
        return
    for place, run in enumerate(runs):
        assert run is not None
        exponents, blocked = run
        if exponents is None:
            continue
        arrival.changed = True
        flat = exponents.reshape(channels, -1)
        bad = is_broken(flat, base)
        touched = ((flat > 0) & (flat != NOTHING)).any(dim=1)
        mixed = (flat == 0).any(dim=1) & touched & ~bad.any(dim=1)
        invalid |= (bad.any(dim=1) | mixed).cpu()
        if bool(bad.any()) and blocked:
            arrival.reasons.append(blocked)
        if bool(mixed.any()):
            arrival.reasons.append(CONSTANTS)
        digit = torch.where(flat > 0, (flat - base) * base**place, 0)
        label = torch.where(flat == 0, 0, digit + (place == 0))
        label = torch.where(flat == NOTHING, NOTHING, label)
        maps = label if maps is None else torch.where(label == NOTHING, NOTHING, maps + label)
    if maps is not None:
        known = maps != NOTHING
        low = torch.where(known, maps, NOTHING).amin(dim=1)
        high = torch.where(known, maps, -1).amax(dim=1)
        labels = torch.where(low == high, low, VARYING)
        labels = torch.where(known.any(dim=1), labels, DEAD).cpu().long()
        labels[invalid] = INVALID
        if bool((labels == VARYING).any()):
            arrival.maps[group] = maps.cpu()
    arrival.labels.append(labels)
