"""Finds additions that fuse levels, and the layers that can be scaled in a summand's stead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scale_equalization.finding import Observer
from scale_equalization.finding.calls import Call
from scale_equalization.finding.observer import SumLocation
from scale_equalization.finding.outputs import outputs_of, same_outputs
from scale_equalization.finding.probes import NOTHING, exponents_of
from scale_equalization.layers import is_equalized, layers_by_name
from scale_equalization.patterns import matches
from scale_equalization.state import calibrating

from .edges import edge_weights
from .pairs import SumFusion
from .scaling import scalable

Run = Callable[[], Any]


class _Finder(Observer):
    """The run as it is: every sum of levels with its summands, every call with its input."""

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        super().__init__(model, exclude)
        self.sources: dict[SumLocation, tuple[str, str]] = {}
        self.operands: dict[SumLocation, tuple[Tensor, Tensor]] = {}
        self.totals: dict[SumLocation, Tensor] = {}
        self.calls: dict[int, tuple[Tensor, Tensor]] = {}
        self.weighted = edge_weights(model)  # these take up the scales themselves

    def adding(
        self, location: SumLocation, operands: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        first, second = operands
        self._pending = first.clone(), second.clone()  # before the first is added to in place
        self._names = self.note(first).source, self.note(second).source
        return operands

    def added(
        self, location: SumLocation, operands: tuple[Tensor, Tensor], total: Tensor, fuses: bool
    ) -> Tensor:
        if fuses and location[0] not in self.encoder and location[0] not in self.weighted:
            self.sources[location] = self._names
            self.operands[location] = self._pending
            self.totals[location] = total.clone()
        return total

    def consume(self, call: Call) -> Tensor | None:
        output = call.run()
        self.calls[call.number] = call.input.clone(), output.clone()
        return output


class _Scaled(Observer):
    """A run with the candidates' parameters multiplied, each by a power of two of its own."""

    def __init__(
        self, model: nn.Module, exclude: Sequence[str], found: _Finder, powers: dict[str, int]
    ) -> None:
        super().__init__(model, exclude)
        self.found, self.powers = found, powers
        self.by_power = {power: name for name, power in powers.items()}
        self.rejected: set[str] = set()
        self.unclear = False

    def adding(
        self, location: SumLocation, operands: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if location not in self.found.totals:
            return operands
        pairs = zip(
            operands, self.found.operands[location], self.found.sources[location], strict=True
        )
        for now, before, source in pairs:
            expected = before * 2.0 ** self.powers.get(source, 0)
            if not torch.equal(now, expected):
                self._reject(before, now)
                self.rejected.add(source)
        return operands

    def added(
        self, location: SumLocation, operands: tuple[Tensor, Tensor], total: Tensor, fuses: bool
    ) -> Tensor:
        known = self.found.totals.get(location)
        return total if known is None else known.clone()

    def consume(self, call: Call) -> Tensor | None:
        before, output = self.found.calls[call.number]
        if not torch.equal(before, call.input):
            self._reject(before, call.input)
        return output * 2.0 ** self.powers.get(call.module, 0)

    def _reject(self, before: Tensor, now: Tensor) -> None:
        powers = set(exponents_of(before, now).flatten().tolist()) - {0, NOTHING}
        known = {self.by_power[power] for power in powers if power in self.by_power}
        self.rejected |= known
        self.unclear |= len(known) < len(powers)


def find_sums(
    model: nn.Module, run: Run, exclude: Sequence[str], taken: Iterable[str], force: bool
) -> tuple[SumFusion, ...]:
    """The sums of a network, with the producers that may be scaled.

    Args:
        model: The network.
        run: Runs it on one and the same batch.
        exclude: Patterns of modules that are left alone.
        taken: Names of layers that are changed for another reason.
        force: Take producers too that were equalized before.
    """
    finder = _Finder(model, exclude)
    outputs = _pass(model, finder, run)
    sources = [source for pair in finder.sources.values() for source in pair]
    once = [source for source in sources if source and sources.count(source) == 1]
    layers = layers_by_name(model)
    candidates = [
        name
        for name in once
        if _may_be_scaled(layers.get(name), force)
        and name not in taken
        and name not in finder.encoder
        and not matches(name, exclude)
    ]
    free = _free(model, run, exclude, finder, outputs, candidates)
    if free:
        free &= _free_in_eval(model, run, exclude, sorted(free))
    found = []
    for location, pair in finder.sources.items():
        first, second = (source if source in free else "" for source in pair)
        found.append(SumFusion(location, pair, (first, second)))
    return tuple(found)


def _may_be_scaled(layer: nn.Module | None, force: bool) -> bool:
    """Whether a layer has a weight that is trained and was not equalized before."""
    if layer is None or (is_equalized(layer) and not force):
        return False
    parameters = scalable(layer)
    return bool(parameters) and all(p.requires_grad for p in parameters)


def _free_in_eval(
    model: nn.Module, run: Run, exclude: Sequence[str], candidates: list[str]
) -> set[str]:
    """The same in eval mode, where a network may do something else with them."""
    finder = _Finder(model, exclude)
    try:
        outputs = _pass(model, finder, run, training=False)
    except Exception:  # whatever a network has against a training batch in eval mode
        return set(candidates)
    return _free(model, run, exclude, finder, outputs, candidates, training=False)


def _free(
    model: nn.Module,
    run: Run,
    exclude: Sequence[str],
    finder: _Finder,
    outputs: list[Tensor],
    candidates: list[str],
    training: bool = True,
) -> set[str]:
    """Those that, multiplied, change their own summand and nothing else."""
    while candidates:
        powers = {name: 3 + i for i, name in enumerate(candidates[:30])}
        probe = _Scaled(model, exclude, finder, powers)
        with _multiplied(model, powers):
            same = same_outputs(_pass(model, probe, run, training), outputs)
        if not probe.rejected and not probe.unclear and same:
            rest = _free(model, run, exclude, finder, outputs, candidates[30:], training)
            return set(powers) | rest
        if probe.rejected & set(candidates):
            candidates = [name for name in candidates if name not in probe.rejected]
        elif len(candidates) > 1:
            alone = ([name] for name in candidates)
            return set[str]().union(
                *(_free(model, run, exclude, finder, outputs, one, training) for one in alone)
            )
        else:
            return set()
    return set()


@contextmanager
def _multiplied(model: nn.Module, powers: dict[str, int]) -> Iterator[None]:
    layers = layers_by_name(model)
    kept = [(p, p.detach().clone()) for name in powers for p in scalable(layers[name])]
    try:
        with torch.no_grad():
            for name, power in powers.items():
                for values in scalable(layers[name]):
                    values.mul_(2.0**power)
        yield
    finally:
        with torch.no_grad():
            for values, before in kept:
                values.copy_(before)


def _pass(model: nn.Module, observer: Observer, run: Run, training: bool = True) -> list[Tensor]:
    with calibrating(model, training), observer.watching():
        return outputs_of(run())
