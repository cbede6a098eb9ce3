"""Sums with learned edge weights: scales go into the weights, and the quotient keeps their sum."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from scale_equalization import (
    AlreadyEqualizedError,
    Report,
    equalize_,
    fold_,
)
from scale_equalization.sums.pairs import balance_edges
from torch import Tensor, nn
from torch.nn import functional as F
from weighted_pyramid import EPS, Pyramid


@pytest.fixture
def network() -> Pyramid:
    torch.manual_seed(0)
    return Pyramid().double()


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(3)]


def inputs_of(network: nn.Module, name: str, images: list[Tensor]) -> list[Tensor]:
    """All values of each map that a fusion takes, resized as it resizes them."""
    calls: list[list[Tensor]] = []

    def keep(_: nn.Module, maps: tuple[Tensor, ...]) -> None:
        size = maps[0].shape[-2:]
        calls.append(
            [x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear") for x in maps]
        )

    handle = network.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for x in images:
            network.train()(x)
    handle.remove()
    return [torch.cat([x.flatten() for x in maps]) for maps in zip(*calls, strict=True)]


def summand_stds(network: nn.Module, name: str, images: list[Tensor]) -> list[float]:
    weights = network.get_submodule(name).edge_weights.detach().relu()
    weights = weights / (weights.sum() + EPS)
    maps = inputs_of(network, name, images)
    return [float(w * x.std(correction=0)) for w, x in zip(weights, maps, strict=True)]


def test_summands_end_up_with_one_std(network, images):
    before = {name: summand_stds(network, name, images[:1]) for name in ("down", "merge")}
    report = equalize_(network, images[:1], sums=True)
    for name in ("down", "merge"):  # one batch: nothing is estimated, all levels at once
        assert max(before[name]) / min(before[name]) > 2
        after = summand_stds(network, name, images[:1])
        assert after == pytest.approx([after[0]] * len(after), rel=1e-10)
    assert {m.name: m.weights for m in report.sums} == {"down": (1.0,) * 2, "merge": (1.0,) * 3}


def test_std_over_many_batches_is_that_of_all_values(network, images):
    equalize_(network, images, sums=True, tolerance=0)
    for name in ("down", "merge"):  # scales of levels before are those of all batches, to 0.5 %
        after = summand_stds(network, name, images)
        assert after == pytest.approx([after[0]] * len(after), rel=0.01)


def test_new_weights_are_the_weighted_harmonic_mean_over_the_std(network, images):
    stds = [float(x.std(correction=0)) for x in inputs_of(network, "down", images)]
    mean = 2 / (1 / stds[0] + 1 / stds[1])
    equalize_(network, images, sums=True, tolerance=0)
    expected = torch.tensor([mean / s for s in stds], dtype=torch.float64)
    torch.testing.assert_close(network.down.edge_weights.detach(), expected, rtol=1e-10, atol=0)
    assert float(network.down.edge_weights.detach().sum()) == pytest.approx(2, abs=1e-12)


def test_folded_network_computes_the_explicit_one(network, images):
    """The oracle divides every map by its std and multiplies all by one constant c."""
    explicit = copy.deepcopy(network)
    equalize_(network, images[:1], sums=True)

    def divided(name: str) -> None:
        fuse = explicit.get_submodule(name)
        stds = torch.stack([x.std(correction=0) for x in inputs_of(explicit, name, images[:1])])
        c = len(stds) / (1 / stds).sum()

        def replace(_: nn.Module, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(c * x / s for x, s in zip(maps, stds, strict=True))

        fuse.register_forward_pre_hook(replace)

    divided("down")  # before "merge": that is measured behind it
    divided("merge")
    for x in images:
        ours, theirs = network.train()(x), explicit.train()(x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_unequal_weights_give_stds_in_their_proportion(network, images):
    with torch.no_grad():
        network.merge.edge_weights.copy_(torch.tensor([1.0, 2.0, 0.5]))
    equalize_(network, images[:1], sums=True, force=True)
    after = summand_stds(network, "merge", images[:1])
    assert [s / after[0] for s in after] == pytest.approx([1, 2, 0.5], rel=1e-10)
    assert float(network.merge.edge_weights.detach().sum()) == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("weights", "stds", "wanted"),
    [
        ((1, 1, 1), (1, 2, 4), (12 / 7, 6 / 7, 3 / 7)),
        ((1, 0, 1), (1, 5, 3), (1.5, 1, 0.5)),
        ((1, -2, 1), (1, 5, 3), (1.5, 1, 0.5)),
        ((1, 1, 1), (1, 0, 3), (1.5, 1, 0.5)),
        ((1, 1), (0, 3), (1, 1)),
        ((3, 1), (6, 1), (0.8, 1.6)),  # stds 2 and 1 of what is weighted
    ],
)
def test_factors_keep_the_sum_and_leave_dead_edges(weights, stds, wanted):
    assert balance_edges(weights, stds) == pytest.approx(wanted)
    alive = [w for w in weights if w > 0]
    changed = [w * a for w, a in zip(weights, balance_edges(weights, stds), strict=True) if w > 0]
    assert sum(changed) == pytest.approx(sum(alive))


def test_only_edge_weights_change_and_only_once(network, images):
    before = copy.deepcopy(network.state_dict())
    equalize_(network, images, sums=True)
    once = copy.deepcopy(network.state_dict())
    changed = {k for k, v in once.items() if not torch.equal(v, before[k])}
    assert changed == {"down.edge_weights", "merge.edge_weights"}
    again = equalize_(network, images, sums=True)
    assert all(torch.equal(v, once[k]) for k, v in network.state_dict().items())
    assert [m.weights for m in again.sums] == [(), ()]
    assert "equalized already; force=True" in str(again)


def test_weights_of_an_equalized_file_are_left_alone(network, images):
    equalize_(network, images, sums=True)
    fresh = Pyramid().double()
    fresh.load_state_dict(network.state_dict())
    report = equalize_(fresh, images, sums=True)
    assert torch.equal(fresh.down.edge_weights, network.down.edge_weights)
    assert "its edge weights differ: trained or equalized before; force=True" in str(report)


def test_off_measures_what_fold_folds(network, images):
    untouched = copy.deepcopy(network)
    measured = equalize_(untouched, images, sums=True, mode="off")
    assert torch.equal(untouched.merge.edge_weights, network.merge.edge_weights)
    folded = equalize_(network, images, sums=True)
    assert measured.sums == folded.sums
    assert Report.from_dict(folded.to_dict()) == folded
    assert "2 sums" in str(folded)
    assert "(edge x " in str(folded)


@pytest.mark.parametrize("in_place", [False, True])
def test_sums_in_place_are_scaled_like_others(in_place, images):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            total, up = 4.0 * self.a(x), F.interpolate(self.b(x), scale_factor=2.0)
            if in_place:
                total += up
                return total
            return total + up

    torch.manual_seed(0)
    network = Residual().double()
    (measure,) = equalize_(network, images, sums=True, tolerance=0).sums
    first, second = ([s.std * s.scale, s.producer] for s in measure.summands)
    assert first == [pytest.approx(second[0]), "a"]
    assert second[1] == "b"


def batches_of(dtype: torch.dtype, images: list[Tensor]) -> Iterator[Tensor]:
    return (x.to(dtype) for x in images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_reaches_the_same_weights(dtype, network, images):
    low = copy.deepcopy(network).to(dtype)
    equalize_(network, images, sums=True, tolerance=0)
    equalize_(low, batches_of(dtype, images), sums=True, tolerance=0)
    for name in ("down", "merge"):
        found = low.get_submodule(name).edge_weights.double()
        wanted = network.get_submodule(name).edge_weights
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)


def test_report_applied_to_a_copy_scales_its_sums_too(network, images):
    fresh = copy.deepcopy(network)
    report = equalize_(network, images, sums=True)
    fold_(fresh, report)
    for name, parameter in network.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], parameter), name
    with pytest.raises(AlreadyEqualizedError, match="is equalized already"):
        fold_(fresh, report)
