"""NaN, infinities and ties: what is fused differs from what is resized in none of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seglab.losses import CrossEntropy
from seglab.operators.fusion_conv import FusionConv2d
from seglab.operators.logit_resize import LogitResize
from seglab.operators.resampling import Resampling
from seglab.operators.upsampled import upsampled_argmax, upsampled_nll

NAN, INF = float("nan"), float("inf")


def branches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, side, side, generator=generator) for side in (64, 32, 16)]


def kinds(x: Tensor) -> Tensor:
    """1 for NaN, 2 and 3 for infinities, 0 for numbers."""
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_fused_result_is_not_finite_where_the_plain_one_is(value: float) -> None:
    torch.manual_seed(0)
    conv = FusionConv2d(12, 4, 3, padding=1)
    maps = branches()
    maps[1][0, 2, 10, 12] = value
    maps = [x.requires_grad_() for x in maps]
    found, expected = conv(maps, force="fused"), conv(maps, force="plain")
    assert 0 < (~expected.isfinite()).float().mean() < 0.01
    assert torch.equal(kinds(found), kinds(expected))
    leaves = [*maps, conv.weight]
    found_gradients = torch.autograd.grad(found.sum(), leaves)
    for ours, wanted in zip(
        found_gradients, torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_gradient_that_is_not_finite_reaches_neighbours_only() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1)
    maps = [x.requires_grad_() for x in branches()]
    direction = torch.ones(2, 4, 64, 64)
    direction[0, 1, 20, 20] = NAN
    leaves = [*maps, conv.weight]
    found, expected = (
        torch.autograd.grad(conv(maps, force=force), leaves, direction)
        for force in ("fused", "plain")
    )
    assert (~found[2].isfinite()).float().mean() < 0.02
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(kinds(ours), kinds(wanted))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_gradient_of_the_loss_stays_where_the_plain_one_is(value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 12, 12, generator=generator)
    logits[0, 1, 6, 5] = value
    logits.requires_grad_()
    target = torch.zeros(1, 40, 40, dtype=torch.int64)
    factor = torch.ones(1, 40, 40)
    (found,) = torch.autograd.grad(upsampled_nll(logits, target, factor), logits)
    loss = F.cross_entropy(resize(logits, (40, 40)), target, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    assert not (~found.isfinite() & expected.isfinite()).any()
    # -inf masks a class: its probability is 0 and nothing is lost
    assert bool(found.isfinite().all()) == (value == -INF)


def test_factor_of_zero_ignores_whatever_the_logits_are() -> None:
    logits = torch.randn(1, 5, 8, 8)
    logits[0, :, 2, 2], logits[0, 1, 6, 6] = NAN, -INF
    target = torch.randint(0, 5, (1, 32, 32))
    factor = torch.ones(1, 32, 32)
    factor[:, 3:17, 3:17] = factor[:, 20:, 20:] = 0
    clean = logits.nan_to_num(0, neginf=0)
    for how in (LogitResize(), LogitResize(Resampling("nearest")), LogitResize(through=(16, 16))):
        values = []
        for x in (logits, clean):
            leaf = x.clone().requires_grad_()
            loss = upsampled_nll(leaf, target, factor, how)
            (gradient,) = torch.autograd.grad(loss, leaf)
            values.append((loss.detach(), gradient))
        torch.testing.assert_close(values[0], values[1])


def test_masked_class_has_a_finite_loss_in_nearest_mode() -> None:
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    logits[:, 2] = -INF
    logits.requires_grad_()
    target = torch.tensor([0, 1, 3])[torch.randint(0, 3, (2, 13, 20))]
    found = CrossEntropy().on_upsampled(logits, target, LogitResize(Resampling("nearest")))
    full = F.interpolate(logits, size=(13, 20), mode="nearest")
    expected = F.cross_entropy(full, target)
    assert expected.isfinite()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    )


@pytest.mark.parametrize("n_classes", [2, 9, 15, 17, 19, 33, 150, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_go_to_the_lower_class(n_classes: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 1, 16, 16, generator=generator).to(dtype)
    found = upsampled_argmax(one.expand(1, n_classes, 16, 16), (61, 53))
    assert not found.any()
    lower = torch.randn(1, n_classes, 9, 8, generator=generator).to(dtype)
    twice = upsampled_argmax(
        torch.cat([lower, lower], dim=1), (31, 33), LogitResize(through=(17, 40))
    )
    assert int(twice.max()) < n_classes


def test_argmax_of_not_a_number_stays_with_its_neighbours() -> None:
    logits = torch.randn(1, 20, 16, 16)
    expected = upsampled_argmax(logits, (64, 64))
    logits[0, 7, 8, 8] = NAN
    found = upsampled_argmax(logits, (64, 64))
    assert torch.equal(found.long(), resize(logits, (64, 64)).argmax(dim=1))
    assert (found != expected).float().mean() < 0.02
