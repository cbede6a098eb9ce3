"""What is said of each branch: how it was resized, where it comes from, which values count."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scale_equalization import find_fusions, measure_scales
from torch import nn


class Net(nn.Module):
    """A fine and a coarse map, joined by `join` and fused."""

    def __init__(self, join, width: int = 9) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, padding=1)
        self.coarse = nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.BatchNorm2d(5), nn.ReLU())
        self.between = nn.Conv2d(5, 5, 1)
        self.fuse = nn.Conv2d(width, 2, 1)
        self.join = join

    def forward(self, x):
        fine, coarse = self.fine(x), self.coarse(x)
        return self.fuse(self.join(self, fine, coarse))


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(3))


def cat(*maps):
    return torch.cat(maps, 1)


RESIZES = {
    "bilinear": (lambda m: F.interpolate(m, (16, 24), mode="bilinear"), 4.0, "bilinear"),
    "by default": (lambda m: F.interpolate(m, scale_factor=4.0), 4.0, "nearest"),
    "bicubic": (lambda m: F.interpolate(m, None, 4, "bicubic", True), 4.0, "bicubic"),
    "module": (nn.Upsample(scale_factor=4, mode="bilinear"), 4.0, "bilinear"),
    "old module": (nn.UpsamplingNearest2d(scale_factor=4), 4.0, "nearest"),
    "twice": (
        lambda m: F.interpolate(F.interpolate(m, scale_factor=2), (16, 24), mode="bilinear"),
        4.0,
        "bilinear",
    ),
    "antialiased": (
        lambda m: F.interpolate(m, (16, 24), mode="bilinear", antialias=True),
        4.0,
        "bilinear",
    ),
    "aten": (lambda m: torch._C._nn.upsample_bilinear2d(m, (16, 24), False), 4.0, "bilinear"),
    "warp": (
        lambda m: F.grid_sample(m, torch.zeros(2, 16, 24, 2), align_corners=False),
        4.0,
        "bilinear",
    ),
    "kept behind ReLU and norm": (
        lambda m: F.batch_norm(
            F.relu(F.interpolate(m, (16, 24))), torch.zeros(5), torch.ones(5)
        ).tanh(),
        4.0,
        "nearest",
    ),
    "pixels shuffled": (lambda m: F.pixel_shuffle(m.repeat(1, 16, 1, 1), 4), 1.0, None),
}


@pytest.mark.parametrize("resize", RESIZES)
def test_resizing_before_the_concatenation_is_described(x, resize):
    function, ratio, mode = RESIZES[resize]
    net = Net(lambda net, fine, coarse: cat(fine, function(coarse)))
    fine, coarse = find_fusions(net, x)[0].branches
    assert (fine.upsampling, fine.interpolation) == (1.0, None)
    assert (coarse.upsampling, coarse.interpolation) == (ratio, mode)


def test_resizing_the_concatenation_counts_for_all_its_branches(x):
    def join(net, fine, coarse):
        fine = F.interpolate(fine, (4, 6), mode="area")
        return F.interpolate(cat(fine, coarse), (16, 24), mode="bilinear")

    found = [(b.upsampling, b.interpolation) for b in find_fusions(Net(join), x)[0].branches]
    assert found == [(1.0, "bilinear"), (4.0, "bilinear")]


def test_only_the_width_or_the_depth_may_be_resized():
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv3d(6, 2, 1)

        def forward(self, x):  # (N, C, D, H, W): the height is the last but one
            tall = F.interpolate(x[:, :, ::2, ::4], x.shape[2:], mode="trilinear")
            wide = F.interpolate(x[..., ::2], x.shape[2:])
            return self.fuse(torch.cat([tall, wide], 1))

    tall, wide = find_fusions(Volume(), torch.randn(1, 3, 4, 8, 6))[0].branches
    assert (tall.upsampling, tall.interpolation) == (4.0, "trilinear")
    assert (wide.upsampling, wide.interpolation) == (2.0, "nearest")


def test_sources_are_the_modules_that_made_the_maps(x):
    def join(net, fine, coarse):
        coarse = F.interpolate(coarse, scale_factor=4)
        return cat(fine.relu(), coarse, net.between(coarse).contiguous())

    fine, coarse, third = find_fusions(Net(join, 14), x)[0].branches
    assert (fine.source, third.source) == ("fine", "between")
    assert coarse.source == "coarse.1"  # ReLU passes on what the norm made
    assert third.upsampling == 1.0  # a convolution starts anew


def test_a_branch_cut_out_of_a_concatenation_is_itself_again(x):
    def join(net, fine, coarse):
        both = cat(fine, F.interpolate(coarse, scale_factor=4))
        return cat(both.split([4, 5], 1)[1], both[:, :4])

    coarse, fine = find_fusions(Net(join), x)[0].branches
    assert (coarse.upsampling, coarse.source) == (4.0, "coarse.1")
    assert (fine.upsampling, fine.source) == (1.0, "fine")


def test_nested_concatenations_become_their_branches(x):
    def join(net, fine, coarse):
        inner = cat(coarse, net.between(coarse))
        return cat(fine, F.interpolate(inner, scale_factor=4))

    branches = find_fusions(Net(join, 14), x)[0].branches
    assert [(b.start, b.stop, b.upsampling) for b in branches] == [
        (0, 4, 1.0),
        (4, 9, 4.0),
        (9, 14, 4.0),
    ]


class Functional(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


def test_the_norm_that_follows_is_named(x):
    net = Net(lambda net, fine, coarse: cat(fine, F.interpolate(coarse, scale_factor=4)))
    for follower, norm in (
        (nn.BatchNorm2d(2), "fuse.1"),
        (nn.Sequential(nn.Dropout(), nn.InstanceNorm2d(2)), "fuse.1.1"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2)), None),  # it would not remove a mean
        (nn.GroupNorm(1, 2), None),
        (Functional(), None),  # no module to speak of
    ):
        net.fuse = nn.Sequential(nn.Conv2d(9, 2, 1), follower)
        assert find_fusions(net, x)[0].norm == norm


OVERWRITTEN = {
    "operands": lambda a, b, both: (a.mul_(3), b.sigmoid_(), both)[2],
    "operand, then result": lambda a, b, both: (a.zero_(), both)[1],
    "through a view": lambda a, b, both: (a[:, :1].zero_(), both)[1],
}


@pytest.mark.parametrize("case", OVERWRITTEN)
def test_values_count_as_they_were_at_the_concatenation(case):
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            a, b = x * 1, x * 5
            return self.fuse(OVERWRITTEN[case](a, b, torch.cat([a, b], 1)))

    x = torch.randn(4, 3, 8, 8)
    report = measure_scales(InPlace(), [x])
    expected = [factor * np.std(x.numpy().astype(np.float64)) for factor in (1, 5)]
    assert [row["std"] for row in report.rows] == pytest.approx(expected, rel=1e-6)
