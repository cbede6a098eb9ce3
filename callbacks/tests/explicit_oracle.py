"""The explicit equalizer by forward pre-hooks, and what a network does with its concatenations.

Independent of the package: hooks on the consumers, factors on the parts of concatenations, numpy.
The explicit form divides the input channels [start, stop) of every reported consumer by the std
reported for them; the weights stay as they were.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from scale_equalization import ScaleEqualizationError, equalize_
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
FACTORS = (0.37, 5.3)  # positive, and no power of two


def channel_axis(module, x) -> int:
    """The axis of the input channels of a convolution or linear layer."""
    return x.dim() - 1 if isinstance(module, nn.Linear) else x.dim() - len(module.kernel_size) - 1


def calibrating(network):
    """The network in training mode with dropout off: the mode it is measured in."""
    network.train()
    for module in network.modules():
        if "Dropout" in type(module).__name__:
            module.eval()
    return network


def run(network, batch, forward=None):
    """The output for the same random draws every time, flattened to a list of tensors."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = network(batch) if forward is None else forward(network, batch)
    return [result] if isinstance(result, torch.Tensor) else list(result)


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
            part.sub_(row["mean"] if center else 0.0).div_(row["std"])
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
    for left, right in zip(a, b, strict=True):
        assert torch.isfinite(left).all()
        assert torch.isfinite(right).all()
        scale = max(float(right.abs().max()), 1e-300)
        worst = max(worst, float((left - right).abs().max()) / scale)
    return worst


class Scaled(TorchFunctionMode):
    """Multiplies one part of one concatenation; counts concatenations and their parts."""

    def __init__(self, call: int = -1, part: int = 0, factor: float = 1.0) -> None:
        super().__init__()
        self.call, self.part, self.factor = call, part, factor
        self.parts: list[int] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function not in CONCATENATIONS:
            return function(*args, **kwargs)
        tensors = list(args[0] if args else kwargs.pop("tensors"))
        self.parts.append(len(tensors))
        if len(self.parts) - 1 == self.call:
            tensors[self.part] = tensors[self.part] * self.factor
        return function(tensors, *args[1:], **kwargs)


def taken(network, batch, mode, pinned=None, forward=None):
    """Inputs and outputs of every linear layer by (name, call); outputs are `pinned` if given."""
    inputs, outputs, handles = {}, {}, []
    calls: dict[str, int] = defaultdict(int)

    def record(name, args, output):
        key = (name, calls[name])
        calls[name] += 1
        inputs[key] = args[0].detach().clone()
        outputs[key] = output if pinned is None else pinned[key]
        return outputs[key]

    for name, module in network.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            hook = lambda m, a, o, name=name: record(name, a, o)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    try:
        with mode:
            result = run(network, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs, result


class Behaviour:
    """How the input of every linear layer follows the parts of every concatenation.

    For each call of a layer and each part: channels that are multiplied as the part is, and
    channels that stay. All outputs of linear layers are held at those of the unchanged run.
    """

    def __init__(self, network, batches, forward=None) -> None:
        self.network = calibrating(copy.deepcopy(network))
        self.forward = forward
        self.scaled: dict[tuple, dict[tuple, np.ndarray]] = defaultdict(dict)
        self.same: dict[tuple, dict[tuple, np.ndarray]] = defaultdict(dict)
        self.touched: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self.calls: dict[str, int] = defaultdict(int)
        for number, batch in enumerate(batches):
            for factor in FACTORS if len(batches) == 1 else (FACTORS[number % 2],):
                self._probe(number, batch, factor)

    def _probe(self, number, batch, factor) -> None:
        counting = Scaled()
        reference, pinned, _ = taken(self.network, batch, counting, None, self.forward)
        for name, call in reference:
            self.calls[name] = max(self.calls[name], call + 1)
        for call, parts in enumerate(counting.parts):
            for part in range(parts):
                mode = Scaled(call, part, factor)
                inputs, _, _ = taken(self.network, batch, mode, pinned, self.forward)
                for key, x in inputs.items():
                    self._compare(key, (call, part), reference[key], x, factor, number)

    def _compare(self, key, label, before, after, factor, number) -> None:
        axis = channel_axis(self.network.get_submodule(key[0]), before)
        before, after = (x.movedim(axis, 0).flatten(1).double() for x in (before, after))
        scale = before.abs().max()
        near = [(after - k * before).abs().amax(1) <= 1e-11 * scale * k for k in (factor, 1.0)]
        key = (*key, number)
        for store, now in zip((self.scaled, self.same), near, strict=True):
            old = store[key].get(label)
            store[key][label] = now.numpy() if old is None else old & now.numpy()
        if ((after - before).abs().amax() > 1e-3 * scale).item():
            self.touched[key[0]].add(label)

    @property
    def fusing(self) -> set[str]:
        """The layers that take something of two parts of one concatenation."""
        return {
            name
            for name, labels in self.touched.items()
            if max(Counter(call for call, _ in labels).values()) > 1
        }

    def follows(self, name: str, start: int, stop: int) -> bool:
        """Whether, at every call, one part alone decides the scale of the channels."""
        keys = [key for key in self.scaled if key[0] == name]
        return bool(keys) and all(
            any(
                scaled[start:stop].all() and not self.same[key][label][start:stop].all()
                for label, scaled in self.scaled[key].items()
            )
            for key in keys
        )

    def labels(self, name: str, start: int, stop: int) -> frozenset:
        """The parts that decide the scale of all these channels, at any call."""
        return frozenset(
            label
            for key in self.scaled
            if key[0] == name
            for label, scaled in self.scaled[key].items()
            if scaled[start:stop].all() and not self.same[key][label][start:stop].all()
        )

    def pure(self, name: str) -> bool:
        """Whether every channel is multiplied as some part is or stays, for every part."""
        keys = [key for key in self.scaled if key[0] == name]
        return all(
            (scaled | self.same[key][label]).all()
            for key in keys
            for label, scaled in self.scaled[key].items()
        )

    def used_elsewhere(self, name: str, batch) -> bool:
        """Whether the layer's weight matters when all linear layers give held outputs."""
        network = copy.deepcopy(self.network)
        weight = network.get_submodule(name).weight
        before = taken(network, batch, contextlib.nullcontext(), None, self.forward)
        with torch.no_grad():
            weight.mul_(torch.rand_like(weight) + 0.25)
        after = taken(network, batch, contextlib.nullcontext(), before[1], self.forward)
        pairs = [(before[0][k], after[0][k]) for k in before[0]]
        pairs += list(zip(before[2], after[2], strict=True))
        return not all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in pairs)


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


def check_measures(before, report, batches, forward=None, rtol=1e-7) -> None:
    """Every std is numpy's over what the consumer took, with all upstream fusions equalized.

    Over every batch, unless fusions are nested: then over that run of batches for which the scales
    upstream were settled (to 1 %, as documented), as long as the row's count says. A branch whose
    channels are scattered has one std over all rows of its own.
    """
    behaviour = Behaviour(before, batches[:2], forward)
    equalized = _values(before, report, batches, forward)
    raw = _values(before, _plain(report), batches, forward)
    nested = any(
        not np.allclose(a[key], b[key], rtol=1e-9, atol=1e-12 * np.abs(b[key]).max())
        for a, b in zip(equalized, raw, strict=True)
        for key in a
    )
    for row in report.rows:
        own = (row["fusion"], row["start"])
        label = behaviour.labels(row["fusion"], row["start"], row["stop"])
        whole = [
            (r["fusion"], r["start"])
            for r in report.rows
            if r["fusion"] == row["fusion"]
            and behaviour.labels(r["fusion"], r["start"], r["stop"]) == label
        ]
        runs = [(0, len(batches))]
        if nested:
            runs = [(i, j) for j in range(len(batches) + 1) for i in range(j)]
        found = []
        for (i, j), keys in itertools.product(runs, ([own], whole)):
            x = np.concatenate([values[key] for values in equalized[i:j] for key in keys])
            near = 0.0101 if nested else rtol
            right = np.isclose(row["std"], x.std(), rtol=near, atol=0)
            right &= np.isclose(row["mean"], x.mean(), rtol=0, atol=near * x.std())
            found.append(x.std())
            if right and row["count"] == x.size:
                break
        else:
            raise AssertionError(f"{row}: numpy says {found}, nested: {nested}")
        assert np.isclose(row["scale"] * row["std"], 1.0, rtol=1e-9), row


def check_rows(before, report, batches, forward=None) -> None:
    """Rows do not overlap, follow one part each, and their weights have no second use."""
    behaviour = Behaviour(before, batches, forward)
    end: dict[str, int] = defaultdict(int)
    for row in report.rows:
        name, start, stop = row["fusion"], row["start"], row["stop"]
        assert end[name] <= start < stop, row
        end[name] = stop
        assert behaviour.follows(name, start, stop), f"{row}: no single part decides this slice"
        assert behaviour.pure(name), f"{row}: the input is not the parts' multiples"
    for name in end:
        assert not behaviour.used_elsewhere(name, batches[0]), f"{name}.weight is used elsewhere"


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].shape == right[k].shape
        and torch.equal(left[k].nan_to_num(nan=7.0), right[k].nan_to_num(nan=7.0))
        for k in left
    )


def equalize_or_refuse(network, batches, *, forward=None, **options):
    """The report, or None if refused by an error, which changes nothing."""
    before = copy.deepcopy(network)
    flags = [module.training for module in network.modules()]
    try:
        report = equalize_(network, batches, forward=forward, tolerance=0, **options)
    except ScaleEqualizationError as error:
        assert str(error).strip()
        assert states_equal(before, network), "an error left changed weights behind"
        return None
    finally:
        assert flags == [module.training for module in network.modules()]
    return report


def check(before, after, report, batches, forward=None) -> None:
    """The changed network is the explicit one, its stds are numpy's, nothing else changed."""
    check_rows(before, report, batches, forward)
    check_measures(before, report, batches, forward)
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


def refused_and_unchanged(network, batches, name: str = "fuse", **options):
    """Equalize; the named layer keeps its weight and is named in the error or the report."""
    weight = network.get_submodule(name).weight.detach().clone()
    before = copy.deepcopy(network)
    try:
        report = equalize_(network, batches, tolerance=0, **options)
    except ScaleEqualizationError as error:
        assert name in str(error), "the error does not name the layer"
        assert states_equal(before, network), "an error left changed weights behind"
        return str(error)
    assert torch.equal(weight, network.get_submodule(name).weight), "changed in silence"
    assert name not in folded(report), "reported as folded"
    reasons = [refusal.reason for refusal in report.refusals if name in refusal.name]
    assert reasons, "left alone without a reason in report.refusals"
    assert name in said(report)
    return " ".join(reasons)
