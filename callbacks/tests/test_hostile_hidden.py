"""Fusions that are easily passed over: found, or listed in the report with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from behaviour_oracle import run
from explicit_oracle import (
    attempt,
    difference,
    equal_or_refused,
    equalize_or_refuse,
    explicit,
    folded,
    mentions,
)
from scale_equalization import Report, equalize_
from torch import nn
from toy_network import Toy, cat, conv, data, linear, plain, pooled

# -- fusions that are easily passed over -------------------------------------------------------


def buffer(write):
    def operation(net, a, b):
        x = torch.zeros(len(a), 8, *a.shape[2:], dtype=a.dtype)
        return plain(net, a, b), net.head3(write(x, a, b))

    return operation


def assign(x, a, b):
    x[:, :4], x[:, 4:] = a, b
    return x


def copy_by_index(x, a, b):
    return x.index_copy_(1, torch.arange(4), a).index_copy_(1, torch.arange(4, 8), b)


def copy_into_views(x, a, b):
    x.narrow(1, 0, 4).copy_(a)
    x.narrow(1, 4, 4).copy_(b)
    return x


HIDDEN = {
    "index_copy_": copy_by_index,
    "slice_scatter": lambda x, a, b: x.slice_scatter(a, 1, 0, 4).slice_scatter(b, 1, 4, 8),
    "assignment": assign,
    "copy_ into narrow": copy_into_views,
    "padded sum": lambda x, a, b: F.pad(a, (0, 0, 0, 0, 0, 4)) + F.pad(b, (0, 0, 0, 0, 4, 0)),
    "hstack": lambda x, a, b: torch.hstack([a, b]),
    "stack": lambda x, a, b: torch.stack([a, b], 1).flatten(1, 2),
    "out=": lambda x, a, b: torch.cat([a, b], 1, out=x),
    "torch.ops": lambda x, a, b: torch.ops.aten.cat([a, b], 1),
}


@pytest.mark.parametrize("how", HIDDEN)
def test_hidden_concatenation_is_found_or_listed(how):
    net = Toy(buffer(HIDDEN[how]), head3=conv())
    before = copy.deepcopy(net)
    with torch.no_grad():
        report = equalize_(net, data(), tolerance=0)
    assert "fuse1" in folded(report)
    assert mentions(report, "head3")
    expected = [x for batch in data() for x in explicit_outputs(before, report, batch)]
    assert difference([y for batch in data() for y in run(net, batch)], expected) < 1e-10


def explicit_outputs(before, report, batch):
    with explicit(before, report):
        return run(before, batch)


def test_global_max_before_linear_is_found_or_listed():
    """PointNet: per-point features and others, maximum over all points, then a Linear."""

    def pointnet(net, a, b):
        points = cat(a.flatten(2), b.flatten(2))
        return net.fuse1(points.max(2).values), net.head5(cat(a, b))

    report = equal_or_refused(Toy(pointnet, linear(), head5=conv()), data())
    assert "head5" in folded(report)
    assert mentions(report, "fuse1")


RECURRENT = {
    "GRUCell": (lambda: nn.GRUCell(8, 4), lambda net, x: net.head3(x)),
    "LSTMCell": (lambda: nn.LSTMCell(8, 4), lambda net, x: net.head3(x)[0]),
    "RNN": (lambda: nn.RNN(8, 4), lambda net, x: net.head3(x)[0]),
    "GRU": (lambda: nn.GRU(8, 4), lambda net, x: net.head3(x)[0]),
    "attention": (lambda: nn.MultiheadAttention(8, 2), lambda net, x: net.head3(x, x, x)[0]),
    "bilinear": (lambda: nn.Bilinear(8, 8, 4), lambda net, x: net.head3(x, x)),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_other_layers_that_take_a_fusion_are_listed(kind):
    make, apply = RECURRENT[kind]
    net = Toy(lambda net, a, b: (plain(net, a, b), apply(net, pooled(cat(a, b)))), head3=make())
    before = copy.deepcopy(net)
    report = equalize_(net, data(), tolerance=0)
    assert "fuse1" in folded(report)
    assert mentions(report, "head3")
    for name, value in before.head3.state_dict().items():
        assert torch.equal(value, net.head3.state_dict()[name])


def test_fusion_of_a_later_batch_is_found_or_listed():
    def sometimes(net, a, b):
        y = plain(net, a, b)
        return y + net.head2(cat(b, a)) if a.abs().max() > 3.0 else y

    batches = data(4)
    batches[2:] = [100.0 * x for x in batches[2:]]
    net = Toy(sometimes, head2=conv())
    before = copy.deepcopy(net)
    report, error = attempt(net, batches)
    assert mentions(error if report is None else report, "head2")
    if "head2" not in folded(report):
        assert torch.equal(before.head2.weight, net.head2.weight)


def test_fusion_that_stops_in_later_batches_is_equal_or_refused():
    def sometimes(net, a, b):
        return plain(net, a, b) if a.abs().max() < 3.0 else net.head2(cat(b, a))

    batches = data(4)
    batches[1:] = [100.0 * x for x in batches[1:]]
    before = Toy(sometimes, head2=conv())
    net = copy.deepcopy(before)
    report = equalize_or_refuse(net, batches)
    if report is None:
        return
    for batch in batches:
        expected = explicit_outputs(before, report, batch)
        assert difference(run(net, batch), expected) < 1e-10
    assert mentions(report, "head2")


def test_spatial_padding_of_a_sum_is_no_fusion():
    """Both maps padded to an even size and added up, as at the borders of an FPN."""

    def padded(net, a, b):
        wide = F.pad(a, (0, 1, 0, 1)) + F.pad(a.relu(), (0, 1, 0, 1))
        return plain(net, a, b), net.head3(wide)

    report = equalize_(Toy(padded, head3=conv(4)), data(), tolerance=0)
    assert folded(report) == {"fuse1"}
    assert not mentions(report, "head3")


def test_channels_that_no_branch_fills_are_said():
    def shifted(net, a, b):
        return net.fuse1(F.pad(cat(a, b), (0, 0, 0, 0, 2, 0)))

    net = Toy(shifted, conv(10))
    before = net.fuse1.weight.detach().clone()
    report = equalize_(net, data(), tolerance=0)
    assert [(row["start"], row["stop"]) for row in report.rows] == [(2, 6), (6, 10)]
    assert "no branch fills its input channels 0:2" in str(report)
    assert torch.equal(net.fuse1.weight[:, :2], before[:, :2])
    again = Report.from_dict(report.to_dict())
    assert again == report
    assert str(again) == str(report)


def test_saturated_fusion_is_listed():
    """The largest value of a clamped map does not change with the branches."""

    def saturated(net, a, b):
        return plain(net, a, b), net.head3((100.0 * cat(a, b)).clamp(-1, 1).amax((2, 3)))

    report = equalize_(Toy(saturated, head3=linear()), data(), tolerance=0)
    assert folded(report) == {"fuse1"}
    assert mentions(report, "head3")
