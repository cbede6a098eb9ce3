"""Modes; trained, equalized and frozen layers.

The oracles are numpy over what hooks saw, the explicit form, and bit equality.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from behaviour_oracle import run
from explicit_oracle import (
    check,
    difference,
    equal_or_refused,
    equalize_or_refuse,
    folded,
    mentions,
    said,
    states_equal,
)
from scale_equalization import equalize_
from torch import nn
from toy_network import Toy, cat, conv, data, plain
from ways_to_copy import WAYS

# -- modes: measured as training will run ------------------------------------------------------


def normed(net, a, b):
    return net.fuse1(cat(net.norm(a), b))


@pytest.mark.parametrize("kept", ["eval", "train"])
def test_norm_is_measured_in_the_mode_of_training(kept):
    net = Toy(normed, norm=nn.BatchNorm2d(4))
    net.train()
    net.norm.running_mean.fill_(0.5)
    net.norm.running_var.fill_(1e-5)
    if kept == "eval":
        net.norm.eval()
    with torch.no_grad():
        x = torch.cat([net.parts(batch)[0] for batch in data()]).numpy()
    y = (x - 0.5) / np.sqrt(1e-5 + net.norm.eps)
    report = equalize_(net, data(), tolerance=0)
    assert report.rows[0]["std"] == pytest.approx(y.std() if kept == "eval" else 1.0, rel=1e-2)
    assert net.norm.training is (kept == "train")
    assert net.training
    assert (net.norm.running_mean == 0.5).all()
    assert net.norm.num_batches_tracked == 0


@pytest.mark.parametrize("frozen_at", ["train", "module"])
def test_norm_kept_in_eval_by_the_class_stays_in_eval(frozen_at):
    """`norm_eval` as mmseg and detectron2 do it: train() leaves the norms in eval."""

    class NormEval(Toy):
        def train(self, mode: bool = True):
            super().train(mode)
            self.norm.eval()
            return self

    net = NormEval(normed, norm=nn.BatchNorm2d(4))
    net.norm.running_var.fill_(1e-4)
    net.train()
    if frozen_at == "module":
        net.norm.requires_grad_(False)
    with torch.no_grad():
        x = torch.cat([net.parts(batch)[0] for batch in data()]).numpy()
    report = equalize_(net, data(), tolerance=0)
    expected = x.std() / np.sqrt(1e-4 + net.norm.eps)
    assert report.rows[0]["std"] == pytest.approx(expected, rel=1e-3)


# -- equalized, trained and frozen layers are left alone ---------------------------------------


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
@pytest.mark.parametrize("way", WAYS)
def test_equalized_network_is_not_folded_again(way, mode):
    net = Toy(plain)
    equalize_(net, data(), mode=mode)
    expected = run(copy.deepcopy(net), data()[0])
    again = WAYS[way](net)
    if again is None:
        return
    before = copy.deepcopy(again)
    report = equalize_(again, data(seed=4))
    assert states_equal(before, again)
    assert not report.rows
    assert mentions(report, "fuse1")
    assert difference(run(again, data()[0]), expected) < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_force_folds_an_equalized_network_again(way):
    net = Toy(plain)
    equalize_(net, data())
    again = WAYS[way](net)
    before = copy.deepcopy(again)
    report = equalize_(again, data(), tolerance=0, force=True)
    check(before, again, report, data())
    assert "fuse1" in folded(report)


def test_only_the_new_fusion_of_an_equalized_network_is_folded():
    net = Toy(lambda net, a, b: (plain(net, a, b), net.head2(cat(b, a))), head2=conv(seed=2))
    equalize_(net, data(), include=["fuse1"])
    before = copy.deepcopy(net)
    report = equalize_(net, data(), tolerance=0)
    assert folded(report) == {"head2"}
    assert torch.equal(before.fuse1.weight, net.fuse1.weight)
    assert not torch.equal(before.head2.weight, net.head2.weight)


def test_state_dict_of_an_equalized_network_has_the_same_keys():
    net = Toy(plain)
    keys = list(net.state_dict())
    equalize_(net, data())
    assert list(net.state_dict()) == keys


NORMS = {
    "group": (lambda: nn.GroupNorm(2, 4), lambda net, x: net.norm(x)),
    "layer": (
        lambda: nn.LayerNorm(4),
        lambda net, x: net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    ),
    "batch": (lambda: nn.BatchNorm2d(4), lambda net, x: net.norm(x)),
}


def with_norm(kind):
    make, apply = NORMS[kind]
    return Toy(lambda net, a, b: apply(net, plain(net, a, b)), norm=make())


def trained(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for batch in data(4):
        optimizer.zero_grad()
        (net(batch) - batch.mean(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("kind", NORMS)
def test_trained_network_is_left_alone(kind):
    fresh = with_norm(kind)
    fresh.load_state_dict(trained(with_norm(kind)).state_dict())
    before = copy.deepcopy(fresh)
    report = equalize_(fresh, data())
    assert states_equal(before, fresh)
    assert not report.rows
    lines = [line for line in said(report).splitlines() if mentions(line, "fuse1")]
    assert len(lines) == 1
    assert "trained" in lines[0]


@pytest.mark.parametrize("kind", NORMS)
def test_trained_network_is_folded_if_forced(kind):
    net = trained(with_norm(kind))
    before = copy.deepcopy(net)
    report = equalize_(net, data(), tolerance=0, force=True)
    assert "fuse1" in folded(report)
    check(before, net, report, data())


@pytest.mark.parametrize("kind", NORMS)
def test_fresh_network_with_drawn_norm_weights_is_folded(kind):
    """As Hugging Face initializes some: norm weights around 1, biases 0."""
    net = with_norm(kind)
    nn.init.normal_(net.norm.weight, 1.0, 0.02, generator=torch.Generator().manual_seed(1))
    assert "fuse1" in folded(equal_or_refused(net, data()))


def test_frozen_consumer_is_left_alone():
    net = Toy(lambda net, a, b: (plain(net, a, b), net.head2(cat(b, a))), head2=conv(seed=2))
    net.fuse1.requires_grad_(False)
    before = copy.deepcopy(net)
    report = equalize_(net, data(), tolerance=0)
    assert folded(report) == {"head2"}
    assert torch.equal(before.fuse1.weight, net.fuse1.weight)
    assert mentions(report, "fuse1")


def test_consumer_with_frozen_weight_is_left_alone():
    net = Toy(plain)
    net.fuse1.weight.requires_grad_(False)
    before = copy.deepcopy(net)
    report = equalize_or_refuse(net, data())
    assert states_equal(before, net)
    assert report is None or mentions(report, "fuse1")
