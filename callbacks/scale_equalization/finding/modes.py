"""Whether a layer that fuses branches in training does the same in eval mode.

A weight that is scaled for what the layer takes in training is wrong for whatever else eval mode
does with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from scale_equalization.fusion import Findings, Fusion, Refusal
from scale_equalization.layers import trained_weight

from .deciding import decide
from .probing import Evidence, gather_evidence


def in_both_modes(
    model: nn.Module,
    findings: Findings,
    forward: Callable[[], Any],
    include: Sequence[str],
    exclude: Sequence[str],
) -> Findings:
    """The findings without the layers that eval mode uses in another way.

    A network that cannot be run on a training batch in eval mode is taken as it trains.
    """
    if not findings.fusions:
        return findings
    try:
        evidence = gather_evidence(model, forward, exclude, training=False)
    except Exception as error:  # whatever a network has against a training batch in eval mode
        reason = f"it cannot be run on this batch there ({type(error).__name__}: {error})"
        note = f"whether the network does the same in eval mode is not known: {reason}"
        return replace(findings, notes=(*findings.notes, note))
    seen = decide(model, evidence, include, exclude)
    pairs = [(fusion, _difference(model, fusion, seen, evidence)) for fusion in findings.fusions]
    refusals = [Refusal(f.name, f"in eval mode {reason}") for f, reason in pairs if reason]
    return replace(
        findings,
        fusions=tuple(fusion for fusion, reason in pairs if not reason),
        refusals=(*findings.refusals, *refusals),
    )


def _difference(model: nn.Module, fusion: Fusion, seen: Findings, evidence: Evidence) -> str:
    """What eval mode does otherwise with a layer; "" if nothing."""
    same = next((other for other in seen.fusions if other.name == fusion.name), None)
    if same is not None:
        return (
            "" if _same_branches(fusion, same) else "it takes other branches, or in another order"
        )
    reason = next((refusal.reason for refusal in seen.refusals if refusal.name == fusion.name), "")
    if reason:
        return reason
    key = id(trained_weight(model, fusion))
    if any(arrival.call.key == key for arrival in evidence.arrivals):
        return "its weight is used on an input that is not this concatenation"
    uses = evidence.log.uses.get(key)
    return f"its weight is used elsewhere: by {uses[0]}" if uses else ""


def _same_branches(training: Fusion, evaluating: Fusion) -> bool:
    """Whether the slices are alike; maps that another module made there are no other order."""
    if [b.stop for b in training.branches] != [b.stop for b in evaluating.branches]:
        return False
    first, second = ([b.source for b in f.branches] for f in (training, evaluating))
    return first == second or sorted(first) != sorted(second)
