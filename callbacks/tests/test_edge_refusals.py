"""What else uses edge weights is refused, and then nothing is changed."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from scale_equalization import NoFusionError, UnsupportedFusionError, equalize_
from torch import Tensor, nn
from torch.nn import functional as F
from weighted_pyramid import EPS, FastNormalized, Pyramid


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]


class Tree(FastNormalized):
    """Adds the last two maps before the first."""

    def forward(self, *maps: Tensor) -> Tensor:
        w = self.edge_weights / (self.edge_weights.sum() + EPS)
        first, *rest = [
            a * F.interpolate(x, maps[0].shape[-2:]) for a, x in zip(w, maps, strict=True)
        ]
        return first + sum(rest[1:], rest[0])


class Exponents(FastNormalized):
    """The other fusion of EfficientDet."""

    def forward(self, *maps: Tensor) -> Tensor:
        w = self.edge_weights.softmax(0)
        total = w[0] * maps[0]
        for a, x in zip(w[1:], maps[1:], strict=True):
            total = total + a * F.interpolate(x, maps[0].shape[-2:])
        return total


class Stacked(FastNormalized):
    def forward(self, *maps: Tensor) -> Tensor:
        resized = torch.stack([F.interpolate(x, maps[0].shape[-2:]) for x in maps], dim=-1)
        return (resized * self.edge_weights).sum(-1) / self.edge_weights.sum()


class Twice(FastNormalized):
    def forward(self, *maps: Tensor) -> Tensor:
        return super().forward(*maps) + super().forward(*maps)


class Leaking(FastNormalized):
    """Its first weight acts behind the sum too."""

    def forward(self, *maps: Tensor) -> Tensor:
        return super().forward(*maps) * self.edge_weights[0]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Tree, "merge.edge_weights: it has 3 edge weights, but does not add 3 maps one after"),
        (Exponents, "its summands are not in proportion to its edge weights"),
        (Stacked, "it did not add anything"),
        (Twice, "does not add 2 maps one after the other in a call .4 seen."),
        (Leaking, "merge.edge_weights: its edge weights act elsewhere too"),
    ],
)
def test_other_uses_of_edge_weights_are_refused(kind, reason, images):
    torch.manual_seed(0)
    network = Pyramid(kind).double()
    before = copy.deepcopy(network.merge.state_dict())
    assert re.search(reason, what_is_said(network, images))
    assert torch.equal(network.merge.edge_weights, before["edge_weights"])


def what_is_said(network: nn.Module, images: list[Tensor]) -> str:
    try:
        return str(equalize_(network, images, sums=True))
    except NoFusionError as error:
        return str(error)


def test_one_that_leaks_does_not_stop_the_others(images):
    torch.manual_seed(0)
    network = Pyramid()
    network.down = Leaking(2)
    report = equalize_(network.double(), images, sums=True)
    assert {refusal.name for refusal in report.refusals} == {"down", "down.edge_weights"}
    assert [measure.name for measure in report.sums if measure.weights] == ["merge"]


def test_frozen_and_shared_weights_are_left_alone(images):
    torch.manual_seed(0)
    frozen = Pyramid().double()
    frozen.down.edge_weights.requires_grad_(False)
    report = equalize_(frozen, images, sums=True)
    assert "down.edge_weights: its edge weights are frozen" in str(report)
    assert torch.equal(frozen.down.edge_weights, torch.ones(2, dtype=torch.float64))
    assert not torch.equal(frozen.merge.edge_weights, torch.ones(3, dtype=torch.float64))

    class Shared(Pyramid):
        def forward(self, x: Tensor) -> Tensor:
            fine, middle, coarse = (level(x) for level in self.levels)
            return self.classify(self.merge(fine, self.mix(self.down(middle, coarse))))

    shared = Shared().double()
    shared.merge.edge_weights = shared.down.edge_weights
    assert "are those of down too" in str(equalize_(shared, images, sums=True))
    assert torch.equal(shared.down.edge_weights, torch.ones(2, dtype=torch.float64))


class OtherwiseInEval(FastNormalized):
    """Uses the weights by themselves once it is trained."""

    def forward(self, *maps: Tensor) -> Tensor:
        total = super().forward(*maps)
        return total if self.training else total * self.edge_weights.square().sum()


def test_weights_that_eval_mode_uses_otherwise_are_left_alone(images: list[Tensor]) -> None:
    torch.manual_seed(0)
    network = Pyramid(OtherwiseInEval).double()
    assert "in eval mode its edge weights act elsewhere" in what_is_said(network, images)
    assert all((m.edge_weights == 1).all() for m in (network.down, network.merge))


def test_weights_are_as_before_if_the_proof_fails(images, monkeypatch):
    torch.manual_seed(0)
    network = Pyramid().double()
    before = copy.deepcopy(network.state_dict())
    from scale_equalization.sums import scaling

    def wrong(weights: Tensor, factors: Tensor) -> Tensor:
        return (weights * factors.flip(0)).to(weights.dtype)

    monkeypatch.setattr(scaling, "multiplied", wrong)
    with pytest.raises(UnsupportedFusionError, match="edge weights scaled, a summand is not"):
        equalize_(network, images, sums=True)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    monkeypatch.undo()
    assert equalize_(network, images, sums=True).sums[0].weights  # no mark was left behind


def test_placebo_of_sums_is_refused(images):
    with pytest.raises(ValueError, match="a placebo of sums would equalize them"):
        equalize_(Pyramid().double(), images, sums=True, placebo=True)
