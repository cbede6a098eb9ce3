"""Copies, recurrence, compiled layers and the user's own forward.

The oracles are numpy over what hooks saw, the explicit form, and bit equality.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from behaviour_oracle import calibrating, run
from explicit_oracle import (
    check,
    difference,
    equalize_or_refuse,
    explicit,
    folded,
    mentions,
    refused_and_unchanged,
    states_equal,
)
from scale_equalization import ScaleEqualizationError, bake_, equalize_
from torch import nn
from toy_network import Toy, cat, conv, data, plain, pooled
from ways_to_copy import WAYS


class MeanTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = Toy(plain)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return self.student(x)


def test_copies_that_keep_old_weights_are_said():
    net = MeanTeacher()
    report = equalize_(net, data())
    assert folded(report) == {"student.fuse1"}
    same = torch.equal(net.teacher.fuse1.weight, net.student.fuse1.weight)
    assert same or mentions(report, "teacher")


def test_averaged_model_keeps_old_weights_and_is_said():
    net = nn.Module()
    net.student = Toy(plain)
    net.average1 = torch.optim.swa_utils.AveragedModel(net.student)
    net.forward = lambda x: net.student(x)
    report = equalize_(net, data(), forward=lambda model, batch: model.student(batch))
    same = torch.equal(net.average1.module.fuse1.weight, net.student.fuse1.weight)
    assert same or mentions(report, "average1")


@pytest.mark.parametrize("gain", [0.2, 30.0])
def test_recurrent_fusion_is_equal_or_refused(gain):
    def recurrent(net, a, b):
        state = torch.zeros_like(a)
        for _ in range(3):
            state = gain * net.fuse1(torch.cat([a, b, state], 1))
        return state

    net = Toy(recurrent, conv(12))
    before, batches = copy.deepcopy(net), data(8)
    report = equalize_or_refuse(net, batches)
    if "fuse1" not in folded(report):
        assert torch.equal(before.fuse1.weight, net.fuse1.weight)
        return
    measured = calibrating(copy.deepcopy(before))
    with explicit(measured, report) as seen:
        for batch in batches:
            run(measured, batch)
    for row in report.rows:  # it settled, or the report says that it did not
        std = np.concatenate(seen["fuse1", row["start"]]).std()
        assert row["std"] == pytest.approx(std, rel=0.05) or mentions(report, "settle")
    with explicit(before, report):
        expected = run(before, batches[0])
    assert difference(run(net, batches[0]), expected) < 1e-10


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_bake_on_a_copy_leaves_the_original(way):
    net = Toy(plain)
    equalize_(net, data(), mode="reparametrize")
    expected = run(net, data()[0])
    replica = WAYS[way](net)
    if replica is None:
        return
    bake_(replica)
    assert difference(run(replica, data()[0]), expected) < 1e-12
    assert difference(run(net, data()[0]), expected) == 0.0
    net(data()[0]).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    bake_(net)
    assert difference(run(net, data()[0]), expected) < 1e-12


def test_copy_of_reparametrized_trains_for_itself():
    net = Toy(plain)
    equalize_(net, data(), mode="reparametrize")
    replica, expected = copy.deepcopy(net), run(net, data()[0])
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1)
    replica(data()[0]).square().mean().backward()
    optimizer.step()
    assert difference(run(net, data()[0]), expected) == 0.0
    assert difference(run(replica, data()[0]), expected) > 0.0


@pytest.mark.parametrize("assign", [False, True])
def test_reparametrized_loads_plain_weights_again_and_again(assign):
    net = Toy(plain)
    equalize_(net, data(), mode="reparametrize")
    expected, weights = run(net, data()[0]), {k: v.clone() for k, v in net.state_dict().items()}
    for _ in range(2):
        net.load_state_dict(weights, assign=assign)
        assert difference(run(net, data()[0]), expected) < 1e-12
    net(data()[0]).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_another_weight_for_a_reparametrized_layer_is_refused():
    net = Toy(plain)
    equalize_(net, data(), mode="reparametrize")
    with pytest.raises(ScaleEqualizationError, match="bake_"):
        net.fuse1.weight = nn.Parameter(torch.zeros(4, 8, 3, 3).double())
    with pytest.raises(ScaleEqualizationError, match="bake_"):
        net.fuse1.reset_parameters()
    bake_(net)
    net.fuse1.reset_parameters()


@pytest.mark.parametrize("written", [False, True])
def test_expanded_buffers_are_restored(written):
    def shifted(net, a, b):
        if written:
            net.offset = net.offset + 1.0
        return net.fuse1(cat(a + net.offset, b))

    net = Toy(shifted)
    net.register_buffer("offset", torch.zeros(1, dtype=torch.float64).expand(1, 4, 1, 1))
    report = equalize_(net, data(), tolerance=0)
    assert "fuse1" in folded(report)
    assert torch.equal(net.offset, torch.zeros(1, 4, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("layer", ["fuse1", "left"])
def test_one_layer_compiled_by_itself_is_equal_or_refused(layer):
    net, plain_net = Toy(plain), Toy(plain)
    setattr(net, layer, torch.compile(getattr(net, layer), backend="eager"))
    weight = plain_net.fuse1.weight.detach().clone()
    report = equalize_or_refuse(net, data())
    compiled = net.fuse1 if layer == "left" else net.fuse1._orig_mod
    if report is None or not report.rows:
        assert torch.equal(compiled.weight, weight)
        return
    divided = [weight[:, r["start"] : r["stop"]] / r["std"] for r in report.rows]
    assert torch.allclose(compiled.weight, torch.cat(divided, 1), rtol=1e-10)
    assert "fuse1" in next(iter(folded(report)))
    with torch.no_grad():
        plain_net.fuse1.weight.copy_(compiled.weight)
    assert difference(run(net, data()[0]), run(plain_net, data()[0])) < 1e-10


def test_forward_takes_model_and_batch():
    net = Toy(plain)
    before = copy.deepcopy(net)
    batches = [{"left": x, "name": "x"} for x in data()]
    report = equalize_(net, batches, tolerance=0, forward=lambda model, batch: model(batch["left"]))
    check(before, net, report, data())


def test_forward_that_uses_another_network_is_refused():
    net, other = Toy(plain), Toy(plain, seed=4)
    before = copy.deepcopy(other)
    with pytest.raises(ScaleEqualizationError, match=r"."):
        equalize_(net, data(), forward=lambda model, batch: other(batch))
    assert states_equal(before, other)


def test_dropout_by_function_does_not_count():
    def dropped(net, a, b):
        return net.fuse1(F.dropout(cat(a, b), 0.5, net.training))

    net = Toy(dropped)
    before = copy.deepcopy(net)
    report = equalize_(net, data(), tolerance=0)
    with torch.no_grad():
        x = torch.cat([cat(*before.parts(batch)) for batch in data()])
    for row in report.rows:
        std = x[:, row["start"] : row["stop"]].numpy().std()
        assert row["std"] == pytest.approx(std, rel=1e-7)


def test_error_in_the_users_forward_leaves_no_trace():
    def fails(net, a, b):
        if a.abs().max() > 3.0:
            raise RuntimeError("the user's own")
        return pooled(plain(net, a, b))

    net, batches = Toy(fails), data(4)
    batches[3] = 100.0 * batches[3]
    before, state = copy.deepcopy(net), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="the user's own"):
        equalize_(net, batches, tolerance=0)
    assert states_equal(before, net)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_refusals_come_with_their_own_reasons():
    """Two refused fusions beside a folded one: each is named with a reason of its own."""

    def mixed(net, a, b):
        return plain(net, a, b), net.head2(cat(b, a).sigmoid()), net.head4(cat(b, a))

    net = Toy(mixed, head2=conv(), head4=conv().requires_grad_(False))
    report = equalize_(copy.deepcopy(net), data())
    assert folded(report) == {"fuse1"}
    assert {"head2", "head4"} <= {refusal.name for refusal in report.refusals}
    assert len({refusal.reason for refusal in report.refusals}) == 2
    net.fuse1.requires_grad_(False)
    refused_and_unchanged(net, data())
