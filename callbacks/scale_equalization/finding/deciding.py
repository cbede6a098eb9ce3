"""From what arrived at each linear layer to fusions, and to refusals with their reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from scale_equalization.fusion import Branch, Findings, Fusion, Refusal
from scale_equalization.layers import layers_by_name
from scale_equalization.patterns import matches, within

from . import operations as ops
from .calls import Call, Log
from .notes import Join, Note
from .probes import NOTHING
from .probing import DEAD, INVALID, VARYING, Arrival, Evidence
from .weights import Locations, callers_first, parameter_locations, reason_against

MAX_RUNS = 64  # a channel shuffle of more slices than this is not followed
EXCLUDED = "excluded by the include and exclude patterns"
CHANGED = (
    "its input is not a branch times a factor: it was written to in place, through a view, after "
    "the concatenation, or changed out of sight"
)
UNMOVED = (
    "its input stays the same when its branches are multiplied: something between saturates or "
    "takes no value from them"
)
Identity = tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What one call says.

    Attributes:
        branches: If several branches arrive that can be told apart.
        reason: Why they cannot; "" also where nothing is fused.
        joined: Widths of the concatenations that tell them apart.
    """

    branches: tuple[Branch, ...] = ()
    reason: str = ""
    joined: tuple[tuple[int, ...], ...] = ()


def decide(
    model: nn.Module, evidence: Evidence, include: Sequence[str], exclude: Sequence[str]
) -> Findings:
    """What can be equalized and what cannot, with the reason, in the order of the forward pass."""
    holders = parameter_locations(model)
    calls: dict[int, list[tuple[Call, Verdict]]] = {}
    for arrival in evidence.arrivals:
        calls.setdefault(arrival.call.key, []).append((arrival.call, _verdict(arrival, evidence)))
    fusions: dict[int, Fusion] = {}
    refusals: list[Refusal] = []
    for key, found in calls.items():
        concerned = {c.module for c, verdict in found if verdict.branches or verdict.reason}
        locations = callers_first(holders.get(key, []), concerned)
        name = locations[0][0] if locations else found[0][0].module
        excluded = not matches(name, include) or matches(name, exclude)
        if excluded:
            if concerned or any(looks_joined(call, evidence.log) for call, _ in found):
                refusals.append(Refusal(name or "the model", EXCLUDED))
        elif concerned:
            reason = _reason_against(model, found, locations, evidence)
            if reason:
                refusals.append(Refusal(name or "the model", reason))
            else:
                fusions[key] = _fusion(model, locations[0], found[0], evidence)
    refusals += _remove_ambiguous(fusions)
    for module, reason in _elsewhere(evidence):
        if within([module], include) and not within([module], exclude):
            refusals.append(Refusal(module or "the model", reason))
    named = _with_upstream(fusions, calls)
    takers = frozenset(a.call.module for a in evidence.arrivals if a.call.note.joins)
    seen = tuple(evidence.log.seen)
    return Findings(named, tuple(dict.fromkeys(refusals)), seen, takers)


def _elsewhere(evidence: Evidence) -> list[tuple[str, str]]:
    """What is fused at no linear layer that is followed."""
    reason = "branches are fused by a sum: there is no input slice to scale"
    return [(module, reason) for module in evidence.log.sums] + evidence.log.lost


def _reason_against(
    model: nn.Module,
    found: Sequence[tuple[Call, Verdict]],
    locations: Locations,
    evidence: Evidence,
) -> str:
    """Why this layer cannot be equalized; "" if it can."""
    calls, verdicts = zip(*found, strict=True)
    reason = reason_against(model, calls, locations, evidence.log)
    if reason:
        return reason
    reason = next((verdict.reason for verdict in verdicts if verdict.reason), "")
    if reason:
        return reason
    if not all(verdict.branches for verdict in verdicts):
        return "its weight is also used on an input that is not this concatenation"
    if len({tuple(b.width for b in verdict.branches) for verdict in verdicts}) > 1:
        return "it is called with concatenations of different widths"
    norm = evidence.log.cancelled.get(calls[0].key)
    if norm and _each_group_has_one_branch(calls[0], verdicts[0].branches):
        return f"depthwise, followed by its own normalization {norm}: a factor cancels there"
    return ""


def _each_group_has_one_branch(call: Call, branches: Sequence[Branch]) -> bool:
    per_group = branches[-1].stop // call.groups
    return all(branch.width % per_group == 0 for branch in branches)


def _fusion(
    model: nn.Module, location: tuple[str, str], found: tuple[Call, Verdict], evidence: Evidence
) -> Fusion:
    (name, parameter), (call, verdict) = location, found
    norm = evidence.log.norms.get(call.key)
    module = None if norm is None else layers_by_name(model).get(norm)
    return Fusion(
        name=name,
        weight_shape=tuple(call.weight.shape),
        groups=call.groups,
        branches=verdict.branches,
        transposed=call.kind in ops.TRANSPOSED,
        norm=norm if hasattr(module, "num_features") else None,
        parameter=parameter,
        follower=evidence.log.followers.get(call.key, ""),
        joined=verdict.joined,
    )


def _remove_ambiguous(fusions: dict[int, Fusion]) -> list[Refusal]:
    """A fusion is known by its module's name, so that a module can have one only."""
    names = [fusion.name for fusion in fusions.values()]
    double = {name for name in names if names.count(name) > 1}
    for key in [key for key, fusion in fusions.items() if fusion.name in double]:
        del fusions[key]
    reason = "several of its weights take concatenations; give each weight a module of its own"
    return [Refusal(name or "the model", reason) for name in sorted(double)]


def _with_upstream(
    fusions: dict[int, Fusion], calls: dict[int, list[tuple[Call, Verdict]]]
) -> tuple[Fusion, ...]:
    """The fusions with the names of those whose output reaches them."""
    found = []
    for key, fusion in fusions.items():
        reaching = frozenset[int]().union(*(call.note.upstream for call, _ in calls[key]))
        names = tuple(other.name for k, other in fusions.items() if k in reaching)
        found.append(replace(fusion, upstream=names))
    return tuple(found)


# -- one call ------------------------------------------------------------------------------


def _verdict(arrival: Arrival, evidence: Evidence) -> Verdict:
    reasons = [reason for reason in arrival.reasons if reason]
    if not arrival.changed:
        silent = bool(arrival.labels) and looks_joined(arrival.call, evidence.log)
        return Verdict(reason=UNMOVED) if silent else Verdict()
    if not arrival.labels:
        return Verdict(reason=reasons[0]) if arrival.call.note.joins else Verdict()
    table = torch.stack(arrival.labels, dim=1)  # (channels, groups)
    identities = [tuple(row) for row in table.tolist()]
    boundaries, unclear = _boundaries(identities, arrival.maps)
    if unclear:
        return Verdict(reason=_why_unclear(unclear, reasons))
    runs = _runs(identities, boundaries)
    labelled = {identities[start] for start, _ in runs if _is_labelled(identities[start])}
    if len(labelled) > 1:
        if len(runs) > MAX_RUNS:
            text = f"its branches are interleaved in {len(runs)} slices, more than {MAX_RUNS}"
            return Verdict(reason=text)
        branches = [_branch(arrival.call, identities[a], a, b, evidence) for a, b in runs]
        maps = _feature_maps([identities[start] for start, _ in runs])
        pairs = zip(branches, maps, strict=True)
        numbered = tuple(replace(branch, feature_map=number) for branch, number in pairs)
        return Verdict(numbered, joined=_widths(labelled, evidence))
    if bool((table == INVALID).any()) and _along_channels(arrival, evidence):
        return Verdict(reason=reasons[0] if reasons else CHANGED)
    return Verdict()


def _feature_maps(identities: Sequence[Identity]) -> list[int | None]:
    """For each slice the number of its map; None if no other slice is of that map."""
    numbers = {each: n for n, each in enumerate(dict.fromkeys(identities))}
    several = {each for each in numbers if identities.count(each) > 1 and _is_labelled(each)}
    return [numbers[each] if each in several else None for each in identities]


def _widths(labelled: set[Identity], evidence: Evidence) -> tuple[tuple[int, ...], ...]:
    """Widths of the joins whose parts differ from channel to channel.

    A writing has none: it is one map, whatever it is written into.
    """
    numbers: set[int] = set()
    for group, labels in enumerate(zip(*labelled, strict=True)):
        parts = {evidence.groups[group][label - 1] for label in labels if label > 0}
        if len(set(labels)) > 1:
            numbers |= {number for number, _ in parts}
    joins = (evidence.log.joins[number] for number in numbers)
    return tuple(sorted({join.widths for join in joins if not join.is_writing}))


def _is_labelled(identity: Identity) -> bool:
    return any(label > 0 for label in identity)


def _boundaries(
    identities: Sequence[Identity], maps: dict[int, Tensor]
) -> tuple[set[int], set[int]]:
    """Channels at which another branch begins; and the kinds that leave it unclear whether."""
    found: set[int] = set()
    unclear: set[int] = set()
    for channel in range(1, len(identities)):
        before, after = identities[channel - 1], identities[channel]
        if DEAD in after or DEAD in before:
            if (DEAD in after) != (DEAD in before):
                found.add(channel)
            continue
        kinds = _difference(before, after, channel, maps)
        if kinds is None:
            found.add(channel)
        else:
            unclear |= kinds
    return found, unclear


def _difference(
    before: Identity, after: Identity, channel: int, maps: dict[int, Tensor]
) -> set[int] | None:
    """None if two neighbours are of different branches; else the kinds that leave it unclear."""
    kinds: set[int] = set()
    for group, (a, b) in enumerate(zip(before, after, strict=True)):
        if a > 0 and b > 0 and a != b:
            return None
        if a == b == VARYING:
            pair = maps[group][channel - 1 : channel + 1]
            known = (pair < NOTHING).all(dim=0)
            if bool((pair[0] != pair[1])[known].any()):
                kinds.add(VARYING)
        elif a != b:
            kinds.add(min(a, b))
    return kinds


def _why_unclear(kinds: set[int], reasons: Sequence[str]) -> str:
    if INVALID in kinds:
        return reasons[0] if reasons else CHANGED
    if VARYING in kinds:
        return "its branches are interleaved differently from position to position"
    return "only a part of its input's channels was joined or written; the rest is no branch"


def _runs(identities: Sequence[Identity], boundaries: set[int]) -> list[tuple[int, int]]:
    """Slices of channels; blank channels inside a branch belong to it."""
    edges = [0, *sorted(boundaries), len(identities)]
    runs: list[tuple[int, int]] = []
    for start, stop in pairwise(edges):
        blank_before = len(runs) > 1 and DEAD in identities[runs[-1][0]]
        if blank_before and identities[runs[-2][0]] == identities[start]:
            runs[-2:] = [(runs[-2][0], stop)]
        else:
            runs.append((start, stop))
    return runs


def _branch(call: Call, identity: Identity, start: int, stop: int, evidence: Evidence) -> Branch:
    """A slice with the story of its innermost part."""
    chain = _chain(identity, evidence)
    if not chain:
        return Branch(start, stop, blank=DEAD in identity)
    ratio, mode = 1.0, None
    for note in (*chain, call.note):
        ratio, mode = ratio * note.upsampling, note.interpolation or mode
    return Branch(start, stop, ratio, mode, chain[0].source)


def _chain(identity: Identity, evidence: Evidence) -> list[Note]:
    """The notes of the parts a slice was, from the innermost join out."""
    notes = []
    for group, label in enumerate(identity):
        if label > 0:
            number, part = evidence.groups[group][label - 1]
            join: Join = evidence.log.joins[number]
            notes.append(join.notes[0 if join.is_writing else part])
    return notes


def _along_channels(arrival: Arrival, evidence: Evidence) -> bool:
    """Whether what was joined and then changed were this layer's channels, by their number."""
    note = arrival.call.note
    joins = [evidence.log.joins[number] for number in note.joins]
    if not joins:
        return True  # changed out of sight
    return any(
        join.is_writing or join.joins_channels or sum(join.widths) == arrival.channels
        for join in joins
    )


def looks_joined(call: Call, log: Log) -> bool:
    """Whether a layer that is not probed takes a concatenation."""
    joins = [log.joins[number] for number in call.note.joins]
    channels = call.weight.shape[0 if call.kind in ops.TRANSPOSED else 1]
    widths = channels * (1 if call.kind in ops.TRANSPOSED else call.groups)
    return any(join.is_writing or sum(join.widths) == widths for join in joins)
