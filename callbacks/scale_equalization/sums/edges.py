"""Sums whose module multiplies each summand by an edge weight: BiFPN's fast normalized fusion.

A module with a parameter `edge_weights` of shape (n,) is taken for one that adds n maps, one after
the other, the i-th times w_i / (sum_j w_j + eps), with relu(w) or w itself. That is not believed
but tried: with other weights of the same sum, every summand has to change in proportion to its own.
Then the scales are folded into these weights (`balance_edges`) and no producer is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scale_equalization.finding import Observer
from scale_equalization.finding.observer import SumLocation
from scale_equalization.finding.outputs import close_outputs, outputs_of, rounding, same_outputs
from scale_equalization.fusion import Refusal
from scale_equalization.layers import is_equalized, layers_by_name
from scale_equalization.patterns import matches
from scale_equalization.state import calibrating

from .pairs import SumFusion

EDGES = "edge_weights"
_FORCE = "; force=True equalizes it all the same"
Found = tuple[tuple[SumFusion, ...], tuple[Refusal, ...]]


def edge_weights(model: nn.Module) -> dict[str, Tensor]:
    """Edge weights by the names of the modules that have them."""
    found = {name: m._parameters.get(EDGES) for name, m in layers_by_name(model).items()}
    return {n: w for n, w in found.items() if w is not None and w.dim() == 1 and len(w) > 1}


class _Additions(Observer):
    """Every addition in the modules given, as it is or, in a second run, with the first's totals.

    Attributes:
        summands: For each module, what it adds.
        sources: For each module, the modules that made these.
        first: For each module, the number of its first addition.
        tangled: Modules that add otherwise than one map after the other.
        totals: What each addition gave.
    """

    def __init__(
        self, model: nn.Module, exclude: Sequence[str], modules: Sequence[str], known: Any = None
    ) -> None:
        super().__init__(model, exclude)
        self.summands: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.sources: dict[str, list[str]] = {name: [] for name in modules}
        self.first: dict[str, int] = {}
        self.tangled: set[str] = set()
        self.totals: dict[SumLocation, Tensor] = {}
        self.known: dict[SumLocation, Tensor] = known or {}
        self._last: dict[str, Tensor] = {}

    def adding(
        self, location: SumLocation, operands: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        name, number = location
        if name in self.summands:
            begins = name not in self._last
            self.first.setdefault(name, number)
            if not begins and operands[0] is not self._last[name]:
                self.tangled.add(name)
            for tensor in operands if begins else operands[1:]:
                self.summands[name].append(tensor.clone())
                self.sources[name].append(self.note(tensor).source)
        return operands

    def added(
        self, location: SumLocation, operands: tuple[Tensor, Tensor], total: Tensor, fuses: bool
    ) -> Tensor:
        if location[0] in self.summands:
            self.totals[location] = total.clone()
            if location in self.known:
                total.copy_(self.known[location])
            self._last[location[0]] = total
        return total


def find_edge_sums(
    model: nn.Module, run: Callable[[], Any], exclude: Sequence[str], force: bool
) -> Found:
    """The sums with edge weights, and those that cannot be equalized, each with the reason.

    What was trained or equalized before, or is frozen, is measured all the same.

    Args:
        model: The network.
        run: Runs it on one and the same batch.
        exclude: Patterns of modules that are left alone.
        force: Take weights too that were trained or equalized before.
    """
    names = [name for name in edge_weights(model) if not matches(name, exclude)]
    if not names:
        return (), ()
    plain = _Additions(model, exclude, names)
    outputs = _pass(model, plain, run)
    weights = {n: w for n, w in edge_weights(model).items() if n in names}
    strange = {name: _how_it_adds(name, plain, len(w)) for name, w in weights.items()}
    kept = {name: _why_not_changed(model, name, force) for name in weights}
    free = [name for name in weights if not strange[name] and not kept[name]]
    strange |= _probed(model, run, exclude, plain, outputs, free)
    free = [name for name in free if not strange[name]]
    strange |= _probed_in_eval(model, run, exclude, free)
    refusals = [Refusal(f"{n}.{EDGES}", strange[n] or kept[n]) for n in weights]
    return (
        tuple(_described(n, plain, w, n in free) for n, w in weights.items() if not strange[n]),
        tuple(refusal for refusal in refusals if refusal.reason),
    )


def _described(name: str, seen: _Additions, weights: Tensor, free: bool) -> SumFusion:
    sources = tuple(seen.sources[name])
    values = tuple(weights.detach().double().tolist()) if free else ()
    return SumFusion((name, seen.first[name]), sources, ("",) * len(sources), values)


def _how_it_adds(name: str, seen: _Additions, n: int) -> str:
    """What keeps its additions from being a sum of n maps; "" if nothing does."""
    if name not in seen.first:
        return "it did not add anything on the first batch"
    n_seen = len(seen.summands[name])
    if name in seen.tangled or n_seen != n:
        return (
            f"it has {n} edge weights, but does not add {n} maps one after the other in a call "
            f"({n_seen} seen)"
        )
    return ""


def _why_not_changed(model: nn.Module, name: str, force: bool) -> str:
    all_weights = edge_weights(model)
    weights = all_weights[name]
    shared = [other for other, w in all_weights.items() if w is weights and other != name]
    if shared:
        return f"its edge weights are those of {shared[0]} too"
    if not weights.requires_grad:
        return "its edge weights are frozen (requires_grad=False)"
    if force:
        return ""
    if is_equalized(layers_by_name(model)[name]):
        return f"its edge weights are equalized already{_FORCE}"
    if bool((weights != weights[0]).any()):
        return f"its edge weights differ: trained or equalized before{_FORCE}"
    return ""


def _probed(
    model: nn.Module,
    run: Callable[[], Any],
    exclude: Sequence[str],
    plain: _Additions,
    outputs: Sequence[Tensor],
    names: Sequence[str],
    training: bool = True,
) -> dict[str, str]:
    """Reasons against those whose summands do not follow their edge weights; "" for the others.

    All at once, and each alone if that fails: what leaks from one sum shows in another's summands.
    """
    probe = _Additions(model, exclude, names, plain.totals)
    with _multiplied(model, names) as factors:
        same = same_outputs(_pass(model, probe, run, training), outputs)
    followed = all(_follow(plain.summands[n], probe.summands[n], factors[n]) for n in names)
    if (same and followed) or not names:
        return dict.fromkeys(names, "")
    if len(names) > 1:
        alone = [_probed(model, run, exclude, plain, outputs, [n], training) for n in names]
        return {name: reason for found in alone for name, reason in found.items()}
    if not followed:
        reason = "its summands are not in proportion to its edge weights at an unchanged sum of "
        return {names[0]: reason + "these, as in fast normalized fusion"}
    return {names[0]: "its edge weights act elsewhere too, or two runs over a batch differ"}


def _probed_in_eval(
    model: nn.Module, run: Callable[[], Any], exclude: Sequence[str], names: Sequence[str]
) -> dict[str, str]:
    """The same in eval mode, where a network may do something else with its edge weights."""
    plain = _Additions(model, exclude, names)
    try:
        outputs = _pass(model, plain, run, training=False)
    except Exception:  # whatever a network has against a training batch in eval mode
        return dict.fromkeys(names, "")
    used = [name for name in names if name in plain.first]
    found = _probed(model, run, exclude, plain, outputs, used, training=False)
    return {name: f"in eval mode {reason}" if reason else "" for name, reason in found.items()}


def _follow(before: Sequence[Tensor], now: Sequence[Tensor], factors: Sequence[float]) -> bool:
    return all(
        close_outputs([y], [x * factor], rounding(y))
        for x, y, factor in zip(before, now, factors, strict=True)
    )


@contextmanager
def _multiplied(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[float]]]:
    """Each edge weight times a factor of its own, their sum as it was; the factors."""
    weights = {name: w for name, w in edge_weights(model).items() if name in names}
    before = {name: w.detach().clone() for name, w in weights.items()}
    factors: dict[str, list[float]] = {}
    try:
        with torch.no_grad():
            for name, w in weights.items():
                alive = w.detach().double().clamp(min=0)
                line = torch.linspace(0, 1, len(w), dtype=torch.float64, device=w.device)
                line = line.square() + 0.5
                line = line * (alive.sum() / (line * alive).sum().clamp(min=1e-300))
                line = torch.where(alive > 0, line, torch.ones_like(line))
                w.copy_(w.double() * line)
                factors[name] = line.tolist()
        yield factors
    finally:
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(before[name])


def _pass(
    model: nn.Module, observer: Observer, run: Callable[[], Any], training: bool = True
) -> list[Tensor]:
    with calibrating(model, training), observer.watching():
        return outputs_of(run())
