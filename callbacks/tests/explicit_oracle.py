"""The explicit equalizer by forward pre-hooks, and comparisons with it.

Independent of the package: hooks on the consumers and numpy. The explicit form divides the input
channels [start, stop) of every reported consumer by the std reported for them, if it is not zero;
the weights stay as they were.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from behaviour_oracle import Behaviour, Scaled, calibrating, channel_axis, run, taken
from scale_equalization import ScaleEqualizationError, equalize_
from torch import nn


@contextlib.contextmanager
def explicit(network, report, center: bool = False):
    """Divide the reported slices at every consumer; yields what each of them took before that."""
    seen, handles = defaultdict(list), []
    rows = defaultdict(list)
    for row in report.rows:
        rows[row["fusion"]].append(row)

    def divide(name, module, args):
        x = args[0].clone()
        axis = channel_axis(module, x)
        for row in rows[name]:
            part = x.narrow(axis, row["start"], row["stop"] - row["start"])
            seen[name, row["start"]].append(part.detach().double().numpy().ravel().copy())
            part.sub_(row["mean"] if center else 0.0).div_(row["std"] or 1.0)
        return (x, *args[1:])

    for name in rows:
        module = network.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: divide(name, m, a)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def difference(a, b) -> float:
    """The largest difference of two lists of tensors relative to the largest value of each."""
    assert len(a) == len(b)
    worst = 0.0
    for left, right in zip((x.detach() for x in a), (x.detach() for x in b), strict=True):
        assert torch.isfinite(left).all()
        assert torch.isfinite(right).all()
        scale = max(float(right.abs().max()), 1e-300)
        worst = max(worst, float((left - right).abs().max()) / scale)
    return worst


def check_weights_and_outputs(before, after, report, batches, forward=None, rtol=1e-10) -> None:
    """The changed network equals the explicit one, and only the reported weights changed."""
    changed = {f"{row['fusion']}.weight" for row in report.rows}
    now = after.state_dict()
    for name, value in before.state_dict().items():
        if name not in changed and ".parametrizations." not in name:
            assert torch.equal(value, now[name]), f"{name} changed"
    for training in (True, False):
        left, right = copy.deepcopy(after).train(training), copy.deepcopy(before).train(training)
        for batch in batches:
            ours = run(left, batch, forward)
            with explicit(right, report):
                expected = run(right, batch, forward)
            assert difference(ours, expected) < rtol


def _values(network, report, batches, forward) -> list[dict]:
    """For each batch: what the reported slices take in training mode, as flat arrays."""
    network, per_batch = calibrating(copy.deepcopy(network)), []
    for batch in batches:
        with explicit(network, report) as seen:
            run(network, batch, forward)
        per_batch.append({key: np.concatenate(arrays) for key, arrays in seen.items()})
    return per_batch


def _plain(report):
    """The same rows with stds of 1: the explicit form of an unchanged network."""
    return SimpleNamespace(rows=[{**row, "std": 1.0} for row in report.rows])


def check_measures(behaviour, before, report, batches, forward=None, rtol=1e-7) -> None:
    """Every std is numpy's over what the consumer took, with all upstream fusions equalized.

    Over every batch, unless fusions are nested: then over that run of batches for which the scales
    upstream were settled (to 1 %, as documented), as long as the row's count says. The paper's
    scale belongs to a branch, so that rows of the same part have one std over all of them.
    """
    equalized = _values(before, report, batches, forward)
    raw = _values(before, _plain(report), batches, forward)
    nested = any(
        not np.allclose(a[key], b[key], rtol=1e-9, atol=1e-12 * np.abs(b[key]).max())
        for a, b in zip(equalized, raw, strict=True)
        for key in a
    )
    for row in report.rows:
        own = behaviour.origin(*_slice(row))
        rows = [r for r in report.rows if r["fusion"] == row["fusion"]]
        whole = [_slice(r)[:2] for r in rows if behaviour.origin(*_slice(r)) == own]
        zeros = [_slice(r)[:2] for r in rows if behaviour.is_blank(*_slice(r))]
        if _slice(row)[:2] in zeros:  # whatever its scale: that of its map, or 1
            assert row["std"] == 0.0 or row["std"] in [r["std"] for r in rows if r is not row]
            continue
        runs = [(0, len(batches))]
        if nested:
            runs = [(i, j) for j in range(len(batches) + 1) for i in range(j)]
        found = []
        for i, j in runs:
            x = np.concatenate([values[key] for values in equalized[i:j] for key in whole])
            blank = sum(values[key].size for values in equalized[i:j] for key in zeros)
            # Which map a slice belongs to that is zero throughout, the count alone can tell.
            x = np.append(x, np.zeros(min(max(row["count"] - x.size, 0), blank)))
            near = 0.0101 if nested else rtol
            right = np.isclose(row["std"], x.std(), rtol=near, atol=0)
            right &= np.isclose(row["mean"], x.mean(), rtol=0, atol=near * x.std())
            found.append(x.std())
            if right and row["count"] == x.size:
                break
        else:
            raise AssertionError(f"{row}: numpy says {found}, nested: {nested}")
        assert np.isclose(row["scale"] * (row["std"] or 1.0), 1.0, rtol=1e-9), row


def _slice(row) -> tuple[str, int, int]:
    return row["fusion"], row["start"], row["stop"]


def check_rows(behaviour, report, batches) -> None:
    """Rows do not overlap, follow one part each, and their weights have no second use."""
    end: dict[str, int] = defaultdict(int)
    for row in report.rows:
        name, start, stop = row["fusion"], row["start"], row["stop"]
        assert end[name] <= start < stop, row
        end[name] = stop
        # A std of 0 has no inverse: the branch is one constant, its scale is 1 and its slice stays
        # as it was (`check_measures` holds both against numpy), so nothing has to decide it. Nor if
        # its channels are zero: a ReLU that lets nothing through in some channels of a map.
        constant = row["std"] == 0.0 or behaviour.is_blank(name, start, stop)
        decided = constant or behaviour.follows(name, start, stop)
        assert decided, f"{row}: no single part decides this slice"
        assert behaviour.pure(name), f"{row}: the input is not the parts' multiples"
    for name in end:
        assert not behaviour.used_elsewhere(name, batches[0]), f"{name}.weight is used elsewhere"


def check_joins(before, after, report, batches, new) -> int:
    """Dividing the parts where they are joined is what the changed layers do, on new data as well.

    The paper's network, written as it is drawn: nothing here knows which channels of a layer belong
    to which part. Returns how many layers could be checked. Those could not that are called twice,
    and those for which no factors of the parts give what the report says, as when a concatenation
    also goes through a nonlinearity to the same layer.
    """
    behaviour, checked = Behaviour(before, batches), 0
    for name in {row["fusion"] for row in report.rows}:
        rows = [row for row in report.rows if row["fusion"] == name]
        factors = _part_factors(behaviour, name, rows)
        if behaviour.calls[name] > 1 or factors is None:
            continue
        network = calibrating(copy.deepcopy(before))
        changed = after.get_submodule(name)
        checked += 1
        for batch in new:
            plain, outputs, _ = taken(network, batch, contextlib.nullcontext())
            divided, _, _ = taken(network, batch, Scaled(factors), outputs)
            with torch.no_grad():
                expected = network.get_submodule(name)(divided[name, 0])
                ours = changed(plain[name, 0])
            assert difference([ours], [expected]) < 1e-10, name
    return checked


def _part_factors(behaviour, name, rows):
    """Factors of parts that give every row its scale; None if there are none."""
    rows = [row for row in rows if not behaviour.is_blank(*_slice(row))]
    sets = [behaviour.labels(*_slice(row)) for row in rows]
    labels = sorted(frozenset().union(*sets))
    if not labels or not all(behaviour.follows_alone(name, label) for label in labels):
        return None
    table = np.array([[label in own for label in labels] for own in sets], dtype=float)
    wanted = np.log([row["scale"] for row in rows])
    found, *_ = np.linalg.lstsq(table, wanted, rcond=None)
    if not np.allclose(table @ found, wanted, atol=1e-12):
        return None
    return dict(zip(labels, np.exp(found), strict=True))


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].shape == right[k].shape
        and torch.equal(left[k].nan_to_num(nan=7.0), right[k].nan_to_num(nan=7.0))
        for k in left
    )


def attempt(network, batches, **options):
    """(report, None), or (None, error) if refused; an error changes nothing and says something."""
    before = copy.deepcopy(network)
    flags = [module.training for module in network.modules()]
    report, refused = None, None
    try:
        report = equalize_(network, batches, **{"tolerance": 0, **options})
    except ScaleEqualizationError as error:
        refused = error
    assert flags == [module.training for module in network.modules()]
    if refused is not None:
        assert str(refused).strip()
        assert states_equal(before, network), "an error left changed weights behind"
    return report, refused


def equalize_or_refuse(network, batches, **options):
    """The report, or None if refused by an error."""
    return attempt(network, batches, **options)[0]


def check(before, after, report, batches, forward=None) -> None:
    """The changed network is the explicit one, its stds are numpy's, nothing else changed."""
    behaviour = Behaviour(before, batches, forward)
    check_rows(behaviour, report, batches)
    check_measures(behaviour, before, report, batches, forward)
    check_weights_and_outputs(before, after, report, batches, forward)


def equal_or_refused(network, batches, *, forward=None, **options):
    """Equalize and check against the oracles; None if refused by an error."""
    before = copy.deepcopy(network)
    report = equalize_or_refuse(network, batches, forward=forward, **options)
    if report is not None:
        check(before, network, report, batches, forward)
    return report


def folded(report) -> set[str]:
    return set() if report is None else {row["fusion"] for row in report.rows}


def said(report) -> str:
    """All that the printed report says."""
    return "" if report is None else str(report)


def mentions(text, name: str) -> bool:
    """Whether a report or an error names this, as a whole word."""
    return text is not None and re.search(rf"\b{re.escape(name)}\b", str(text), re.I) is not None


def refused_and_unchanged(network, batches, name: str = "fuse1", **options):
    """Equalize; the named layer keeps its weight and is named in the error or the report."""
    weight = network.get_submodule(name).weight.detach().clone()
    report, error = attempt(network, batches, **options)
    if error is not None:
        assert mentions(error, name), "the error does not name the layer"
        return str(error)
    assert torch.equal(weight, network.get_submodule(name).weight), "changed in silence"
    assert name not in folded(report), "reported as folded"
    reasons = [refusal.reason for refusal in report.refusals if mentions(refusal.name, name)]
    assert reasons, "left alone without a reason in report.refusals"
    assert mentions(report, name)
    return " ".join(reasons)
