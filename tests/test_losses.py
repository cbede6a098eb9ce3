"""Cross-entropy against a plain numpy loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from seglab.losses import CrossEntropy

IGNORE = 255
Array = NDArray[np.float64]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (2, 5, 6), generator=generator)
    target[0, :2] = IGNORE
    target[1, 3, 2] = IGNORE
    return logits, target


def by_hand(logits: torch.Tensor, target: torch.Tensor) -> list[tuple[float, int]]:
    """(probability of the true class, true class) of every valid pixel."""
    pixels = []
    scores, labels = logits.detach().numpy(), target.numpy()
    for b, y, x in np.ndindex(labels.shape):
        if labels[b, y, x] != IGNORE:
            weights = np.exp(scores[b, :, y, x] - scores[b, :, y, x].max())
            pixels.append((float(weights[labels[b, y, x]] / weights.sum()), int(labels[b, y, x])))
    return pixels


def test_default_divides_by_all_pixels(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    total = sum(-np.log(p) for p, _ in by_hand(*batch))
    assert CrossEntropy()(*batch).item() == pytest.approx(total / 60)


def test_avg_non_ignore_divides_by_valid_pixels(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    losses = [-np.log(p) for p, _ in by_hand(*batch)]
    assert len(losses) == 60 - 13
    expected = pytest.approx(sum(losses) / len(losses))
    assert CrossEntropy(avg_non_ignore=True)(*batch).item() == expected


def test_class_weights_enter_sum_and_divisor(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    weights = [0.5, 1.0, 2.0, 4.0]
    loss = CrossEntropy(class_weight=weights).double()(*batch)
    pixels = by_hand(*batch)
    total = sum(-np.log(p) * weights[c] for p, c in pixels)
    assert loss.item() == pytest.approx(total / sum(weights[c] for _, c in pixels))


@pytest.mark.parametrize(("thresh", "min_kept"), [(0.3, 1), (0.3, 20), (0.9, 5), (0.05, 40)])
def test_hard_pixels_are_those_below_the_bar(
    thresh: float, min_kept: int, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    probabilities = sorted(p for p, _ in by_hand(*batch))
    bar = max(thresh, probabilities[min(2 * min_kept, len(probabilities) - 1)])
    expected = sum(-np.log(p) for p in probabilities if p < bar) / 60
    loss = CrossEntropy(ohem_thresh=thresh, ohem_min_kept=min_kept)(*batch)
    assert loss.item() == pytest.approx(expected)


def test_hard_pixels_without_threshold_are_the_largest(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    hardest = sorted((-np.log(p) for p, _ in by_hand(*batch)), reverse=True)[: 2 * 7]
    assert CrossEntropy(ohem_min_kept=7)(*batch).item() == pytest.approx(sum(hardest) / 60)


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(),
        CrossEntropy(avg_non_ignore=True),
        CrossEntropy(class_weight=[1.0, 2.0, 3.0, 4.0]),
        CrossEntropy(ohem_thresh=0.7, ohem_min_kept=3),
        CrossEntropy(ohem_min_kept=3),
    ],
)
def test_fully_ignored_batch_gives_zero_with_zero_gradient(loss: CrossEntropy) -> None:
    logits = torch.randn(1, 4, 3, 3, requires_grad=True)
    value = loss(logits, torch.full((1, 3, 3), IGNORE))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(),
        CrossEntropy(avg_non_ignore=True),
        CrossEntropy(class_weight=[1.0, 2.0, 0.0, 4.0]),
        CrossEntropy(ohem_thresh=0.7, ohem_min_kept=3),
        CrossEntropy(ohem_min_kept=3),
    ],
)
def test_ignored_pixels_may_be_anything(
    loss: CrossEntropy, poison: float, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, target = batch
    poisoned = logits.clone()
    poisoned.movedim(1, -1)[target == IGNORE] = poison
    results = []
    for x in (logits.requires_grad_(), poisoned.requires_grad_()):
        value = loss.double()(x, target)
        results.append((value.item(), torch.autograd.grad(value, x)[0]))
    assert results[1][0] == results[0][0]
    assert torch.equal(results[1][1], results[0][1])


def test_another_ignore_index_is_respected(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, target = batch
    renamed = torch.where(target == IGNORE, 11, target)
    assert CrossEntropy(ignore_index=11)(logits, renamed) == CrossEntropy()(logits, target)


def test_class_weights_survive_a_cast_to_half_precision() -> None:
    loss = CrossEntropy(class_weight=[0.1, 1.7, 0.0]).to(torch.bfloat16)
    assert loss.class_weight is not None
    assert torch.equal(loss.class_weight, torch.tensor([0.1, 1.7, 0.0]))


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_class_weight_that_is_no_weight_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"class_weight\[1\] is"):
        CrossEntropy(class_weight=[1.0, factor])


def test_class_weights_leave_no_trace_in_checkpoints() -> None:
    assert CrossEntropy(class_weight=[1.0, 2.0]).state_dict() == {}


def test_options_that_do_not_fit_are_named(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="2 factors for 4 classes"):
        CrossEntropy(class_weight=[1.0, 2.0])(*batch)
    with pytest.raises(ValueError, match="ohem_thresh needs ohem_min_kept"):
        CrossEntropy(ohem_thresh=0.7)
    with pytest.raises(ValueError, match=r"probability in \(0, 1\], got 7"):
        CrossEntropy(ohem_thresh=7, ohem_min_kept=1)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        CrossEntropy(ohem_min_kept=0)


@pytest.mark.parametrize("name", ["DiceLoss", "LovaszLoss", "FocalLoss"])
def test_losses_of_smp_fit_in_by_class_path(
    name: str, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    from segmentation_models_pytorch import losses

    logits, target = batch[0].float().requires_grad_(), batch[1]
    loss = getattr(losses, name)(mode="multiclass", ignore_index=IGNORE)(logits, target)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    ignored = logits.grad.movedim(1, -1)[target == IGNORE]
    assert not ignored.any()
    assert logits.grad.any()


def ohem_by_hand(logits: Tensor, target: Tensor, weight: Tensor, thresh: float, n: int) -> float:
    """MMSegmentation's `ohem_pixel_sampler.py` and `cross_entropy_loss.py`, pixel by pixel."""
    probability = logits.double().softmax(dim=1).gather(1, target.unsqueeze(1)).flatten()
    ordered = probability.sort().values
    bar = max(float(ordered[min(n * len(logits), len(ordered) - 1)]), thresh)
    total = 0.0
    for p, label in zip(probability.tolist(), target.flatten().tolist(), strict=True):
        if p < bar:
            total -= float(weight[label]) * math.log(p)
    return total / float(weight[target].sum())


@pytest.mark.parametrize("seed", range(5))
def test_hard_pixels_are_ranked_among_those_of_weight_zero_too(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = 3 * torch.randn(2, 3, 3, 3, generator=generator)
    target = torch.randint(0, 3, (2, 5, 5), generator=generator)
    weight = torch.tensor([1.0, 2.0, 0.0])
    loss = CrossEntropy(class_weight=weight.tolist(), ohem_thresh=0.3, ohem_min_kept=6)
    full = F.interpolate(low, size=(5, 5), mode="bilinear")
    expected = ohem_by_hand(full, target, weight, 0.3, 6)
    assert loss(full, target).item() == pytest.approx(expected, rel=1e-5)
    assert loss.on_upsampled(low, target).item() == pytest.approx(expected, rel=1e-5)


def test_nan_at_pixels_of_weight_zero_is_not_hard() -> None:
    logits = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 4, 4, dtype=torch.int64)
    target[:, :, 2:] = 1
    loss = CrossEntropy(class_weight=[1.0, 0.0], ohem_thresh=0.9, ohem_min_kept=3)
    logits[..., 2:] = torch.nan
    assert loss(logits, target).isfinite()


@pytest.mark.parametrize(("side", "weight"), [(1, None), (8, [100.0, 1.0]), (16, None)])
def test_gradient_of_half_precision_survives_until_it_is_divided(
    side: int, weight: list[float] | None
) -> None:
    logits = torch.zeros(1, 2, side, side, dtype=torch.float16)
    logits[:, 1] = 8
    target = torch.zeros(1, 512, 512, dtype=torch.int64)
    loss = CrossEntropy(class_weight=weight)
    plain, ours = (logits.clone().requires_grad_() for _ in range(2))
    loss(F.interpolate(plain.float(), size=(512, 512), mode="bilinear"), target).backward()
    loss.on_upsampled(ours, target).backward()
    assert plain.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad, rtol=2e-3, atol=1e-6)
