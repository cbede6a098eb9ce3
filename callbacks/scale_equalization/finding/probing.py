"""Runs the network again with its joined maps multiplied by powers of two, and looks what arrives.

See the docstring of the room for why this proves something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scale_equalization.state import calibrating

from . import operations as ops
from .calls import Call, Log
from .notes import Join, Note
from .observer import Observer

DEAD, INVALID, VARYING = -1, -2, -3  # kinds of channels without a label; 0 is "not touched"
N_SAMPLES = 64
FEW = 64  # values per channel below which all are made positive, so that no ReLU blanks a channel

CONSTANTS = (
    "constants lie among a branch's values (a padding with a value, an assignment), which no "
    "factor scales"
)

Part = tuple[int, int]  # number of a join, number of its operand


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
        passes: How often the network was run.
    """

    log: Log
    arrivals: list[Arrival]
    groups: list[list[Part]]
    passes: int


@dataclass(eq=False)
class _Recorded:
    call: Call
    input: Tensor
    output: Tensor


class _Reference(Observer):
    """The run that the others are compared with."""

    def __init__(self, model: nn.Module, exclude: Sequence[str], lively: bool) -> None:
        super().__init__(model, exclude)
        self.lively = lively
        self.calls: list[tuple[Call, int]] = []
        self.recorded: dict[int, _Recorded] = {}
        self.samples: list[Tensor] = []
        self.parts: list[tuple[Part, torch.dtype]] = []
        self.obstacles: dict[int, str] = {}
        self.has_half = False

    def join(self, join: Join, part: int, values: Tensor) -> Tensor:
        if not values.is_floating_point() and not values.is_complex():
            return values
        self.parts.append(((join.number, part), values.dtype))
        return _lively(join, part, values) if self.lively else values

    def consume(self, call: Call) -> Tensor | None:
        slim = call.without_tensors()
        self.calls.append((slim, call.input.shape[call.dim]))
        if not self.parts:
            return None
        self.obstacles[call.number] = _obstacle(call)
        if self.obstacles[call.number]:
            return None
        output = call.run()
        self.recorded[call.number] = _Recorded(slim, call.input.clone(), output.clone())
        return output

    def result(self, name: str, inputs: Sequence[Note], note: Note, output: Tensor) -> Note:
        self.samples.append(_sample(output))
        self.has_half |= output.dtype == torch.float16
        return note


class _Probe(Observer):
    """A run in which the parts of one group of joins are multiplied, each by a power of its own."""

    def __init__(
        self,
        model: nn.Module,
        exclude: Sequence[str],
        reference: _Reference,
        exponents: dict[Part, int],
        base: int,
    ) -> None:
        super().__init__(model, exclude)
        self.reference, self.exponents, self.base = reference, exponents, base
        self.arrived: dict[int, tuple[Tensor | None, str]] = {}
        self.samples = 0
        self.strayed = False

    def join(self, join: Join, part: int, values: Tensor) -> Tensor:
        if not values.is_floating_point() and not values.is_complex():
            return values
        values = _lively(join, part, values) if self.reference.lively else values
        return values * 2.0 ** self.exponents.get((join.number, part), 0)

    def consume(self, call: Call) -> Tensor | None:
        known = self.reference.recorded.get(call.number)
        if known is None:
            return None
        if known.call.key != call.key or known.input.shape != call.input.shape:
            self.strayed = True
        if self.strayed:
            return None
        exponents = None
        if not torch.equal(known.input, call.input):
            exponents = exponents_of(known.input, call.input).movedim(call.dim, 0)
        self.arrived[call.number] = exponents, call.note.blocked
        return known.output.clone()

    def result(self, name: str, inputs: Sequence[Note], note: Note, output: Tensor) -> Note:
        place, self.samples = self.samples, self.samples + 1
        if self.strayed or place >= len(self.reference.samples):
            return note
        before, after = self.reference.samples[place], _sample(output)
        if (
            before.shape == after.shape
            and not _broken(exponents_of(before, after), self.base).any()
        ):
            return note
        spoilt_here = any(each.joins and not each.blocked for each in inputs)
        return note.but(blocked=ops.obstacle(name)) if spoilt_here else note


def gather_evidence(
    model: nn.Module, run: Callable[[], Any], exclude: Sequence[str], lively: bool = True
) -> Evidence:
    """Run the network once for reference, and once or more for each group of joins.

    Args:
        model: The network.
        run: Runs it on one and the same batch.
        exclude: Patterns of modules that are left alone.
        lively: Join random values in the place of the real ones, so that no channel is blank.
    """
    reference = _Reference(model, exclude, lively)
    _pass(model, reference, run)
    groups = _groups(reference)
    arrivals = {
        n: Arrival(r.call, r.input.shape[r.call.dim]) for n, r in reference.recorded.items()
    }
    passes = 1
    for group, parts in enumerate(groups):
        base = _base(reference, parts)
        digits = _digits(len(parts), base)
        runs = []
        for place in range(digits):
            exponents = {p: base + (i // base**place) % base for i, p in enumerate(parts)}
            probe = _Probe(model, exclude, reference, exponents, base)
            _pass(model, probe, run)
            runs.append(probe.arrived)
            reference.log.lost += probe.log.lost
            passes += 1
        for number, arrival in arrivals.items():
            _read(arrival, group, reference.recorded[number], [r.get(number) for r in runs], base)
    kept = []
    for call, channels in reference.calls:
        arrival = arrivals.get(call.number, Arrival(call, channels))
        if reference.obstacles.get(call.number):
            arrival.reasons.append(reference.obstacles[call.number])
            arrival.changed = True
        kept.append(arrival)
    return Evidence(reference.log, kept, groups, passes)


def differs_between_runs(model: nn.Module, run: Callable[[], Any], exclude: Sequence[str]) -> bool:
    """Whether two runs as alike as can be still differ at a linear layer."""
    first = _Reference(model, exclude, False)
    _pass(model, first, run)
    second = _Reference(model, exclude, False)
    _pass(model, second, run)
    pairs = ((r.input, second.recorded.get(n)) for n, r in first.recorded.items())
    return any(b is None or not torch.equal(a, b.input) for a, b in pairs)


def _pass(model: nn.Module, observer: Observer, run: Callable[[], Any]) -> None:
    with calibrating(model), observer.watching():
        run()


def _obstacle(call: Call) -> str:
    """Why a call cannot even be looked at."""
    if torch._C._functorch.is_functorch_wrapped_tensor(call.input):
        return "it runs inside torch.func.vmap or grad, where a branch cannot be measured"
    if call.input.is_complex():
        return "a branch is complex-valued; its scale is not defined here"
    return ""


def _lively(join: Join, part: int, values: Tensor) -> Tensor:
    """Random values in the place of an operand: no channel is blank, both signs occur.

    An operand that was joined before has them already.
    """
    if join.notes[part].joins or torch._C._functorch.is_functorch_wrapped_tensor(values):
        return values
    generator = torch.Generator().manual_seed(1000 * join.number + part)
    fresh = torch.randn(values.shape, generator=generator)
    width = join.widths[part] if not join.is_writing else max(values.shape[0], 1)
    if values.numel() < FEW * max(width, 1):
        fresh = fresh.abs_()
    return fresh.to(values.device, values.dtype)


def _groups(reference: _Reference) -> list[list[Part]]:
    """The parts that are multiplied in the same run: those of joins of one depth."""
    joins = reference.log.joins
    by_depth: dict[int, list[Part]] = {}
    for part, _ in reference.parts:
        by_depth.setdefault(joins[part[0]].depth, []).append(part)
    return [by_depth[depth] for depth in sorted(by_depth)]


def _base(reference: _Reference, parts: Sequence[Part]) -> int:
    """How many powers are told apart in one run; float16 has room for few."""
    chosen = set(parts)
    half = any(dtype == torch.float16 for part, dtype in reference.parts if part in chosen)
    return 4 if half or reference.has_half else 20


def _digits(n: int, base: int) -> int:
    digits = 1
    while base**digits < n:
        digits += 1
    return digits


_BROKEN = -10_000  # not a power of two
NOTHING = 10_000  # zero before and after: any power would do


def exponents_of(before: Tensor, after: Tensor) -> Tensor:
    """For every element k, if after == before * 2**k exactly."""
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    before, after = before.detach().to(wide), after.detach().to(wide)
    m_before, e_before = torch.frexp(before)
    m_after, e_after = torch.frexp(after)
    exponents = (e_after - e_before).to(torch.int32)
    tiny = torch.finfo(wide).tiny * 4
    nothing = (before.abs() < tiny) & (after.abs() < tiny * 2.0**50)
    broken = (m_before != m_after) | ~torch.isfinite(before) | ~torch.isfinite(after)
    exponents[broken] = _BROKEN
    exponents[nothing] = NOTHING
    return exponents


def _broken(exponents: Tensor, base: int) -> Tensor:
    """Where an element is neither untouched nor multiplied by one of the powers, once."""
    touched = (exponents >= base) & (exponents < 2 * base)
    return ~(touched | (exponents == 0) | (exponents == NOTHING))


def _sample(output: Tensor) -> Tensor:
    """Some elements of a tensor, the same of every tensor of its shape."""
    if torch._C._functorch.is_functorch_wrapped_tensor(output) or output.is_complex():
        return torch.zeros(0)
    generator = torch.Generator().manual_seed(output.numel())
    where = [torch.randint(n, (N_SAMPLES,), generator=generator) for n in output.shape]
    if not output.numel() or not where:
        return output.detach().double().reshape(-1).clone()
    return output.detach()[tuple(index.to(output.device) for index in where)].double()


def _read(
    arrival: Arrival,
    group: int,
    recorded: _Recorded,
    runs: Sequence[tuple[Tensor | None, str] | None],
    base: int,
) -> None:
    """One label for each input channel from the runs of one group."""
    labels = torch.zeros(channels := arrival.channels, dtype=torch.int64)
    maps, invalid = None, torch.zeros(channels, dtype=torch.bool)
    if any(run is None for run in runs):
        arrival.reasons.append("the network takes another path when its branches are multiplied")
        arrival.changed = True
        arrival.labels.append(torch.full((channels,), INVALID))
        return
    for place, run in enumerate(runs):
        assert run is not None
        exponents, blocked = run
        if exponents is None:
            continue
        arrival.changed = True
        flat = exponents.reshape(channels, -1)
        bad = _broken(flat, base)
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
