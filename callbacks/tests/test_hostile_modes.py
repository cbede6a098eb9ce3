"""Networks that do something else in eval mode: a weight that is right in training is wrong there.

Each is refused by name, or equal to the explicit form in both modes.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from behaviour_oracle import run
from explicit_oracle import check, difference, folded, refused_and_unchanged
from scale_equalization import equalize_
from torch import nn
from toy_network import Toy, cat, conv, data, plain


def weight_on_another_map(net, a, b):
    return F.conv2d(cat(b, a), net.fuse1.weight, padding=1)


def merged_with_its_norm(net, a, b):
    factor = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    shift = net.norm.bias + (net.fuse1.bias - net.norm.running_mean) * factor
    return F.conv2d(cat(a, b), net.fuse1.weight * factor.view(-1, 1, 1, 1), shift, padding=1)


OTHERWISE = {
    "another order": lambda net, a, b: net.fuse1(cat(b, a)),
    "another map": lambda net, a, b: net.fuse1(cat(a, a).sigmoid()),
    "no concatenation": lambda net, a, b: net.fuse1(a.repeat(1, 2, 1, 1)),
    "a nonlinearity between": lambda net, a, b: net.fuse1(cat(a, b).tanh()),
    "the weight elsewhere": weight_on_another_map,
    "the weight in the output": lambda net, a, b: plain(net, a, b) + net.fuse1.weight.norm(),
    "the norm in the weight": merged_with_its_norm,
    "other widths": lambda net, a, b: net.fuse1(torch.cat([a, b[:, :2], a[:, :2]], 1)),
}


@pytest.mark.parametrize("how", OTHERWISE)
def test_layer_that_eval_mode_uses_otherwise_is_refused(how):
    def modes(net, a, b):
        return net.norm(plain(net, a, b)) if net.training else OTHERWISE[how](net, a, b)

    net = Toy(modes, norm=nn.BatchNorm2d(4))
    assert "in eval mode" in refused_and_unchanged(net, data())


def raises_in_eval(net, a, b):
    if not net.training:
        raise RuntimeError("no targets")
    return plain(net, a, b)


def noisy_in_training(net, a, b):
    return net.fuse1(cat(net.noise(a) if net.training else a, b))


def auxiliary_in_training(net, a, b):
    fused = plain(net, a, b)
    return (fused, net.auxiliary(cat(b, fused))) if net.training else (fused,)


SAME = {
    "raises": raises_in_eval,
    "noise": noisy_in_training,
    "auxiliary": auxiliary_in_training,
}


@pytest.mark.parametrize("how", SAME)
def test_layer_that_eval_mode_uses_alike_is_folded(how):
    net = Toy(SAME[how], auxiliary=conv(), noise=nn.Conv2d(4, 4, 1, groups=4))
    before = copy.deepcopy(net)
    report = equalize_(net, data(), tolerance=0)
    assert {"fuse1"} <= folded(report) <= {"fuse1", "auxiliary"}
    if how == "raises":
        assert any("in eval mode is not known" in note for note in report.notes)
    else:
        check(before, net, report, data())


class Sum(nn.Module):
    """A sum of two levels; in eval mode the lateral map is also an output."""

    def __init__(self, also: bool) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.lateral, self.top, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), conv(4)
        self.also = also

    def forward(self, x):
        lateral = self.lateral(x)
        total = lateral + F.interpolate(5.0 * self.top(self.encoder(x)), scale_factor=2.0)
        outputs = [self.head(total)]
        return [*outputs, lateral] if self.also and not self.training else outputs


@pytest.mark.parametrize("also", [False, True])
def test_summand_that_eval_mode_shows_is_not_scaled(also):
    torch.manual_seed(0)
    net = Sum(also).double()
    before = copy.deepcopy(net)
    report = equalize_(net, data(), tolerance=0, sums=True)
    (measure,) = report.sums
    assert ("lateral" in {summand.producer for summand in measure.summands}) is not also
    if also:
        now, then = (run(each.eval(), data()[0])[1] for each in (net, before))
        assert difference([now], [then]) == 0.0
