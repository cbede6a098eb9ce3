"""Zeros, half precision, the ends of the scale, values that are not finite, random draws.

The oracles are numpy over what hooks saw, the explicit form, and bit equality.
"""

from __future__ import annotations

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from behaviour_oracle import run
from explicit_oracle import (
    difference,
    equalize_or_refuse,
    explicit,
    folded,
    mentions,
    states_equal,
)
from scale_equalization import ScaleEqualizationError, equalize_
from torch import nn
from toy_network import Toy, cat, conv, data, linear, plain

# -- zero weights, norms and the control -------------------------------------------------------


@pytest.mark.parametrize("option", ["preserve_norm", "placebo"])
@pytest.mark.parametrize("zeros", ["all", "first slice", "one output"])
def test_zero_weights_stay_finite_or_are_refused(option, zeros):
    net = Toy(plain)
    where = {"all": ..., "first slice": (slice(None), slice(4)), "one output": 0}[zeros]
    net.fuse1.weight.data[where] = 0.0
    report = equalize_or_refuse(net, data(), **{option: True})
    assert torch.isfinite(net.fuse1.weight).all()
    assert (net.fuse1.weight[where] == 0.0).all()
    assert report is None or all(np.isfinite(row["scale"]) for row in report.rows)


def test_preserve_norm_changes_ratios_only():
    net = Toy(plain)
    before = net.fuse1.weight.detach().clone()
    rows = equalize_(net, data(), tolerance=0, preserve_norm=True).rows
    divided = torch.cat([before[:, r["start"] : r["stop"]] / r["std"] for r in rows], 1)
    expected = divided * (before.norm() / divided.norm())
    assert torch.allclose(net.fuse1.weight, expected, rtol=1e-12, atol=0)


def test_placebo_has_the_norm_of_folding_and_the_old_ratios():
    net = Toy(plain)
    before = net.fuse1.weight.detach().clone()
    rows = equalize_(net, data(), tolerance=0, placebo=True).rows
    divided = torch.cat([before[:, r["start"] : r["stop"]] / r["std"] for r in rows], 1)
    expected = before * (divided.norm() / before.norm())
    assert torch.allclose(net.fuse1.weight, expected, rtol=1e-12, atol=0)


# -- half precision ----------------------------------------------------------------------------


class Pair(nn.Module):
    """A Linear of two vectors of 4 channels, scaled as told."""

    def __init__(self, scales, dtype, weight: float = 0.3) -> None:
        super().__init__()
        self.fuse1 = linear()
        self.fuse1.weight.data.mul_(weight * 8**0.5)
        self.scales = scales
        self.to(dtype)

    def forward(self, x):
        return self.fuse1(torch.cat([x[:, :4] * self.scales[0], x[:, 4:] * self.scales[1]], 1))


def vectors(dtype, n: int = 3):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(64, 8, generator=generator).to(dtype) for _ in range(n)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scales", [(1.0, 1e-4), (1e-6, 1.0), (100.0, 1e-3), (3e4, 1e-7)])
def test_half_weights_of_small_branches_stay_finite(dtype, scales):
    net = Pair(scales, dtype, weight=5.0)
    before = net.fuse1.weight.detach().clone()
    report = equalize_or_refuse(net, vectors(dtype))
    assert torch.isfinite(net.fuse1.weight).all()
    assert ((net.fuse1.weight == 0) == (before == 0)).all(), "a slice vanished"
    if report is None:
        assert torch.equal(net.fuse1.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_rounded_once(dtype):
    net = Pair((0.37, 2.9), dtype)
    before = net.fuse1.weight.detach().double()
    rows = equalize_(net, vectors(dtype), tolerance=0).rows
    assert len(rows) == 2
    expected = torch.cat([before[:, r["start"] : r["stop"]] / r["std"] for r in rows], 1)
    assert torch.equal(net.fuse1.weight, expected.to(dtype))


# -- the ends of the scale ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiny", [1e-20, 1e-23, 1e-30, 1e-37])
def test_tiny_branch_is_equal_or_refused(tiny, dtype):
    net = Pair((1.0, tiny), dtype)
    before = copy.deepcopy(net)
    report = equalize_or_refuse(net, vectors(dtype))
    assert torch.isfinite(net.fuse1.weight).all()
    if "fuse1" not in folded(report):
        assert states_equal(net, before)
        return
    rows = {row["start"]: row for row in report.rows}
    expected = tiny * torch.cat(vectors(dtype)).double()[:, 4:].numpy().std()
    assert rows[4]["std"] == pytest.approx(expected, rel=1e-4, abs=0)
    batch = vectors(dtype)[0]
    with explicit(before, report):
        assert difference(run(net, batch), run(before, batch)) < 1e-4


@pytest.mark.parametrize("huge", [1e12, 1e18, 1e25])
def test_huge_branch_is_equal_or_refused(huge):
    net = Pair((huge, 1.0), torch.float32)
    before, batches = copy.deepcopy(net), vectors(torch.float32)
    report = equalize_or_refuse(net, batches)
    if "fuse1" not in folded(report):
        assert states_equal(net, before)
        return
    expected = huge * torch.cat(batches).double()[:, :4].numpy().std()
    assert report.rows[0]["std"] == pytest.approx(expected, rel=1e-4)
    assert torch.isfinite(net.fuse1.weight).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 3.0, -1e-20, 1e20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_branch_is_refused_or_keeps_its_scale(value, dtype):
    def constant(net, a, b):
        return net.fuse1(cat(torch.full_like(a, value), b))

    net = Toy(constant).to(dtype)
    before = net.fuse1.weight.detach().clone()
    report = equalize_or_refuse(net, [batch.to(dtype) for batch in data()])
    assert torch.isfinite(net.fuse1.weight).all()
    assert torch.equal(net.fuse1.weight[:, :4], before[:, :4]), "rounding noise was equalized"
    if report is not None:
        assert mentions(report, "fuse1")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("at", [0, 2])
def test_batch_that_is_not_finite_changes_nothing(value, sums, at):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.fuse1 = conv(3, 4), conv(3, 4, seed=9), conv(7)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.norm(self.one(x) + 5 * self.two(x)).relu()
            return self.fuse1(torch.cat([x, y], 1))

    net = Both().double()
    before, batches = copy.deepcopy(net), data()
    batches[at][1, 2, 3, 3] = value
    with pytest.raises(ScaleEqualizationError, match=r"."):
        equalize_(net, batches, tolerance=0, sums=sums)
    assert states_equal(before, net)


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 8, 8, dtype=torch.float64)]])
def test_no_samples_is_an_error_of_ours(batches):
    net = Toy(plain)
    before = copy.deepcopy(net)
    with pytest.raises(ScaleEqualizationError, match=r"."):
        equalize_(net, batches)
    assert states_equal(before, net)


CONFLICTS = [
    {"preserve_norm": True, "placebo": True},
    {"mode": "folded"},
    {"tolerance": -0.1},
    {"tolerance": float("nan")},
    {"max_batches": 0},
    {"max_batches": -3},
]


@pytest.mark.parametrize("options", CONFLICTS, ids=str)
@pytest.mark.parametrize("sums", [False, True])
def test_conflicting_options_are_refused_before_any_batch(options, sums):
    read = []

    def batches():
        read.append(1)
        yield from data()

    net = Toy(plain)
    before = copy.deepcopy(net)
    with pytest.raises((ValueError, ScaleEqualizationError), match=next(iter(options))):
        equalize_(net, batches(), sums=sums, **options)
    assert not read
    assert states_equal(before, net)


# -- random draws ------------------------------------------------------------------------------


def streams() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


DRAWS = {
    "torch": lambda: torch.randn(1).item(),
    "python": lambda: random.gauss(0, 1),
    "numpy": lambda: np.random.randn(),
}


@pytest.mark.parametrize("stream", DRAWS)
def test_random_latents_are_drawn_anew_for_every_batch(stream):
    """One number for each batch: were it the same draw every time, its std would be 0."""

    def latent(net, a, b):
        return net.fuse1(cat(torch.full_like(a, DRAWS[stream]()), b))

    net, before = Toy(latent), streams()
    report = equalize_(net, data(64, size=4), tolerance=0)
    assert streams() == before
    assert report.rows[0]["std"] == pytest.approx(1.0, abs=0.35)


def test_generator_that_cannot_be_rewound_is_restored_or_said():
    class Own(Toy):
        def __init__(self) -> None:
            super().__init__(self.latent)
            self.generator = torch.Generator().manual_seed(3)

        @staticmethod
        def latent(net, a, b):
            noise = torch.randn(a.shape, generator=net.generator, dtype=a.dtype)
            return net.fuse1(cat(noise, b))

    net = Own()
    state = net.generator.get_state()
    report = equalize_(net, data(16), tolerance=0)
    assert report.rows[0]["std"] == pytest.approx(1.0, abs=0.1)
    assert torch.equal(net.generator.get_state(), state) or mentions(report, "generator")


def endless():
    n = 0
    while True:
        n += 1
        yield n


ENDLESS = {"generator": endless, "iterator": lambda: iter(range(1, 10**6))}


@pytest.mark.parametrize("kind", ENDLESS)
def test_iterator_of_the_network_is_restored_or_said(kind):
    net = Toy(lambda net, a, b: net.fuse1(cat(a * next(net.factors1), b)))
    net.factors1 = ENDLESS[kind]()
    report = None
    with contextlib.suppress(ScaleEqualizationError):
        report = equalize_(net, data(), tolerance=0)
    assert report is None or next(net.factors1) == 1 or mentions(report, "factors1")


def test_counting_forward_is_restored_or_said():
    def counted(net, a, b):
        net.calls1 += 1
        net.seen1.append(float(a.sum()))
        return plain(net, a, b)

    net = Toy(counted)
    net.calls1, net.seen1 = 5, [1.0]
    report = equalize_(net, data(), tolerance=0)
    assert net.calls1 == 5 or mentions(report, "calls1")
    assert net.seen1 == [1.0] or mentions(report, "seen1")
