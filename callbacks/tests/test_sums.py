"""Sum fusion: summands at one scale, pushed into their producers and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from scale_equalization import (
    NoFusionError,
    Report,
    equalize_,
)
from torch import Tensor, nn
from torch.nn import functional as F


class Pyramid(nn.Module):
    """An FPN of three levels; `gain` multiplies the laterals explicitly, as the oracle does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=2, padding=1) for i in range(3)
        )
        self.top = nn.Conv2d(4, 6, 1)
        self.lateral1 = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.lateral0 = nn.Conv2d(4, 6, 1)
        self.outputs = nn.ModuleList(nn.Conv2d(6, 2, 1) for _ in range(3))
        self.gains = [1.0, 1.0]
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for layer in self.encoder:
            x = layer(x)
            levels.append(x)
        p2 = self.top(levels[2])
        up2, lateral1 = (
            F.interpolate(p2, scale_factor=2.0),
            self.gains[1] * self.lateral1(levels[1]),
        )
        p1 = up2 + lateral1
        up1, lateral0 = (
            F.interpolate(p1, scale_factor=2.0),
            self.gains[0] * self.lateral0(levels[0]),
        )
        p0 = up1 + lateral0
        self.seen = [(up2, lateral1), (up1, lateral0)]
        return [out(p) for out, p in zip(self.outputs, (p0, p1, p2), strict=True)]


@pytest.fixture
def network() -> Pyramid:
    torch.manual_seed(0)
    return Pyramid().double()


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(6)]


def stds(network: Pyramid, images: list[Tensor]) -> list[list[float]]:
    pairs = []
    network.train()
    with torch.no_grad():
        for x in images:
            network(x)
            pairs.append(
                [torch.stack([s.flatten() for s in (pair[0], pair[1])]) for pair in network.seen]
            )
    return [torch.cat([p[i] for p in pairs], 1).std(1, correction=0).tolist() for i in (0, 1)]


def test_summands_meet_at_one_scale(network, images):
    report = equalize_(network, images, sums=True, tolerance=0)
    for top_down, lateral in stds(network, images):
        assert lateral / top_down == pytest.approx(1, abs=0.01)
    assert [m.summands[1].producer for m in report.sums] == ["lateral1.1", "lateral0"]
    assert [m.summands[0].producer for m in report.sums] == ["", ""]  # they feed outputs too


def test_pushing_back_equals_multiplying_the_summand(network, images):
    explicit = copy.deepcopy(network)
    report = equalize_(network, images, sums=True)
    explicit.gains = [m.summands[1].scale for m in report.sums][::-1]
    for ours, theirs in zip(network.train()(images[0]), explicit.train()(images[0]), strict=True):
        assert (ours - theirs).abs().max() <= 1e-10


def test_only_producers_change(network, images):
    before = copy.deepcopy(network.state_dict())
    equalize_(network, images, sums=True)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {
        "lateral1.1.weight",
        "lateral1.1.bias",
        "lateral0.weight",
        "lateral0.bias",
    } - {
        "lateral1.1.bias"  # zero at initialization
    }


def test_off_measures_only_and_default_ignores_sums(network, images):
    before = copy.deepcopy(network.state_dict())
    report = equalize_(network, images, sums=True, mode="off")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert len(report.sums) == 2
    with pytest.raises(NoFusionError, match="fused by a sum"):
        equalize_(network, images)


def test_second_application_changes_nothing(network, images):
    equalize_(network, images, sums=True)
    before = copy.deepcopy(network.state_dict())
    again = equalize_(network, images, sums=True)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert [s.producer for m in again.sums for s in m.summands] == [""] * 4


def test_a_generator_does_and_reparametrize_is_refused(network, images):
    fold = equalize_(network, iter(images), sums=True, tolerance=0)
    assert [m.summands[1].producer for m in fold.sums] == ["lateral1.1", "lateral0"]
    with pytest.raises(ValueError, match='use mode="fold"'):
        equalize_(network, images, sums=True, mode="reparametrize")


def test_sums_are_in_the_report_and_survive_json(network, images):
    report = equalize_(network, images, sums=True)
    assert "lateral0 std" in str(report)
    assert Report.from_dict(report.to_dict()) == report


def test_both_free_summands_meet_in_the_middle(images):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, stride=2, padding=1)

        def forward(self, x):
            up = F.interpolate(self.b(x), scale_factor=2.0, mode="bilinear").relu()
            return (self.a(x) * 4.0 + up).sum()

    torch.manual_seed(0)
    (measure,) = equalize_(Two().double(), images, sums=True, tolerance=0).sums
    before = [s.std for s in measure.summands]
    after = [s.std * s.scale for s in measure.summands]
    assert after[0] == pytest.approx(after[1])
    assert sum(v**2 for v in after) == pytest.approx(sum(v**2 for v in before))
    assert [s.producer for s in measure.summands] == ["a", "b"]
