"""Maps put together by whatever operation: found, or listed; and what a slice of a map is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from explicit_oracle import check, folded
from scale_equalization import equalize_
from torch import nn
from toy_network import Toy, cat, conv, data


def blank(a):
    return torch.zeros(len(a), 8, *a.shape[2:], dtype=a.dtype)


def ahead(a):
    return F.pad(a, (0, 0, 0, 0, 0, 4))


def behind(b):
    return F.pad(b, (0, 0, 0, 0, 4, 0))


def add_into_views(a, b):
    x = blank(a)
    x.narrow(1, 0, 4).add_(a)
    x.narrow(1, 4, 4).add_(b)
    return x


def results_into_views(a, b):
    x = blank(a)
    torch.mul(a, 1.0, out=x[:, :4])
    torch.mul(b, 1.0, out=x[:, 4:])
    return x


def scatter_add(a, b):
    index = torch.arange(4).view(1, 4, 1, 1).expand(a.shape)
    return blank(a).scatter_add(1, index, a).scatter_add(1, index + 4, b)


def by_numpy(a, b):
    return torch.from_numpy(np.concatenate([a.detach().numpy(), b.detach().numpy()], 1))


def by_einsum(a, b):
    rows = torch.eye(8, dtype=a.dtype)
    left = torch.einsum("nchw,cd->ndhw", a, rows[:4])
    return left + torch.einsum("nchw,cd->ndhw", b, rows[4:])


def by_masks(a, b):
    mask = (torch.arange(8) < 4).view(1, 8, 1, 1).to(a.dtype)
    return a.repeat(1, 2, 1, 1) * mask + b.repeat(1, 2, 1, 1) * (1 - mask)


OTHERWISE = {
    "add_ into views": add_into_views,
    "results into views": results_into_views,
    "index_add_": lambda a, b: (
        blank(a).index_add_(1, torch.arange(4), a).index_add_(1, torch.arange(4, 8), b)
    ),
    "scatter_add": scatter_add,
    "where": lambda a, b: torch.where((torch.arange(8) < 4).view(1, 8, 1, 1), ahead(a), behind(b)),
    "maximum": lambda a, b: torch.maximum(ahead(a.relu()), behind(b.relu())),
    "padded sum": lambda a, b: ahead(a) + behind(b),
    "numpy": by_numpy,
    "einsum": by_einsum,
    "masks": by_masks,
}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("how", OTHERWISE)
def test_maps_put_together_otherwise_are_listed(how, normed):
    """Behind normalizations as well, where nothing is left of a factor on what they took."""

    def both(net, a, b):
        if normed:
            a, b = net.norm(a).relu(), F.gelu(b)
        return net.fuse1(cat(a, b)), net.other(OTHERWISE[how](a, b))

    net = Toy(both, other=conv(), norm=nn.BatchNorm2d(4))
    before = copy.deepcopy(net)
    with torch.no_grad():
        report = equalize_(net, data(), tolerance=0)
    assert folded(report) == {"fuse1"}
    assert torch.equal(before.other.weight, net.other.weight)
    (reason,) = (refusal.reason for refusal in report.refusals if refusal.name == "other")
    assert "several maps" in reason


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_concatenation_inside_a_scripted_function_is_listed():
    @torch.jit.script
    def joined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.cat([a, b], 1)

    net = Toy(lambda net, a, b: (net.fuse1(cat(a, b)), net.other(joined(a, b))), other=conv())
    report = equalize_(net, data(), tolerance=0)
    assert folded(report) == {"fuse1"}
    assert "other" in {refusal.name for refusal in report.refusals}


ONE_MAP = {
    "as it is": lambda a, b: a.repeat(1, 2, 1, 1),
    "sum": lambda a, b: (a + b).repeat(1, 2, 1, 1),
    "gate": lambda a, b: (a * b.mean((2, 3), keepdim=True).sigmoid()).repeat(1, 2, 1, 1),
    "relu6": lambda a, b: F.relu6(b).repeat(1, 2, 1, 1),
    "padded": lambda a, b: ahead(a),
    "shuffled": lambda a, b: F.channel_shuffle(b.repeat(1, 2, 1, 1), 2),
}


@pytest.mark.parametrize("how", ONE_MAP)
def test_one_map_is_not_mistaken_for_several(how):
    def both(net, a, b):
        return net.fuse1(cat(a, b)), net.other(ONE_MAP[how](a, b))

    report = equalize_(Toy(both, other=conv()), data(), tolerance=0)
    assert folded(report) == {"fuse1"}
    assert not [refusal for refusal in report.refusals if refusal.name == "other"]


# -- slices ------------------------------------------------------------------------------------


def uneven(x):
    return x * torch.arange(1.0, 1.0 + x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)


SCATTERED = {
    "shuffled": lambda a, b: F.channel_shuffle(cat(a, b), 2),
    "stacked": lambda a, b: torch.stack([a, b], 2).flatten(1, 2),
    "turned round": lambda a, b: cat(a, b).roll(2, 1),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("how", SCATTERED)
def test_slices_of_one_map_share_one_scale(how, groups):
    """The scale belongs to a branch, not to a channel; the oracle is numpy over whole maps."""

    def scattered(net, a, b):
        return net.fuse1(SCATTERED[how](uneven(a), uneven(b)))

    net = Toy(scattered, conv(groups=groups))
    before = copy.deepcopy(net)
    report = equalize_(net, data(), tolerance=0)
    check(before, net, report, data())
    with torch.no_grad():
        parts = [[uneven(x).numpy() for x in before.parts(batch)] for batch in data()]
    expected = {float(np.concatenate([pair[i] for pair in parts]).std()) for i in (0, 1)}
    assert len(report.rows) > 2
    for row in report.rows:
        assert any(row["std"] == pytest.approx(std, rel=1e-12) for std in expected)
    assert len({round(row["std"], 12) for row in report.rows}) == 2


# -- batches -----------------------------------------------------------------------------------


class Box(dict):
    """A batch of a kind that nobody knows."""


class Normalizing(Toy):
    """Writes into its input, as a network does that normalizes in place."""

    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(0.3))


@pytest.mark.parametrize("kind", ["tensor", "mapping", "object"])
def test_network_that_writes_into_its_batch_is_measured_once(kind):
    """Nested, with a first batch that misleads, so that measuring starts again."""

    class Sample:
        def __init__(self, x) -> None:
            self.x = x

    wrap, unwrap = {
        "tensor": (lambda x: x, lambda batch: batch),
        "mapping": (lambda x: Box(x=x), lambda batch: batch["x"]),
        "object": (Sample, lambda batch: batch.x),
    }[kind]
    net = Normalizing(lambda net, a, b: net.other(cat(plain_fusion(net, a, b), b)), other=conv())
    before = copy.deepcopy(net)
    images = [x * (0.02 if i == 0 else 1.0) for i, x in enumerate(data(12))]
    batches = [wrap(x.clone()) for x in images]
    report = equalize_(net, batches, tolerance=0, forward=lambda m, batch: m(unwrap(batch)))
    assert all(torch.equal(x, unwrap(batch)) for x, batch in zip(images, batches, strict=True))
    with torch.no_grad():
        parts = [before.parts((x - 0.5) * 0.3) for x in images]
    for row in [row for row in report.rows if row["fusion"] == "fuse1"]:
        expected = np.concatenate([pair[row["branch"]].numpy() for pair in parts]).std()
        assert row["std"] == pytest.approx(expected, rel=1e-9)


def plain_fusion(net, a, b):
    return net.fuse1(cat(a, b))


def test_scales_that_do_not_settle_are_said():
    def recurrent(net, a, b):
        state = torch.zeros_like(a)
        for _ in range(4):
            state = net.fuse1(torch.cat([a, b, state], 1))
        return state

    report = equalize_(Toy(recurrent, conv(12)), data(8), tolerance=0)
    assert any("fuse1 did not settle" in note for note in report.notes)


@pytest.mark.parametrize("again", [False, True])
def test_scales_of_a_stream_that_misled_are_said(again):
    """With a list measuring starts again; of an iterator nothing is left."""
    net = Toy(lambda net, a, b: net.other(cat(plain_fusion(net, a, b), b)), other=conv())
    batches = [x * (0.02 if i == 0 else 1.0) for i, x in enumerate(data(4))]
    report = equalize_(net, batches if again else iter(batches), tolerance=0)
    assert any("fuse1 did not settle" in note for note in report.notes) is not again
