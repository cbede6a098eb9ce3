"""Losses of smp, sums of losses, and what is refused before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from seglab.losses import CrossEntropy, WeightedSum, refuse_unfit_loss


def smp_loss(name: str, **options: Any) -> Any:
    from segmentation_models_pytorch import losses

    return getattr(losses, name)(**{"mode": "multiclass", "ignore_index": 255} | options)


def dice_by_hand(logits: Tensor, target: Tensor) -> float:
    """Mean over the present classes of 1 - 2 |P T| / (|P| + |T|), ignored pixels left out."""
    valid = target != 255
    shares = logits.softmax(1).movedim(1, -1)[valid].double().numpy()
    truth = np.eye(logits.shape[1])[target[valid].numpy()]
    scores = 2 * (shares * truth).sum(0) / (shares + truth).sum(0)
    return float(np.where(truth.any(0), 1 - scores, 0).mean())


def test_dice_of_smp_is_dice_on_valid_pixels() -> None:
    logits = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    target = torch.arange(70).view(2, 5, 7) % 3
    target[0, :2] = 255
    found = smp_loss("DiceLoss")(logits, target).item()
    assert found == pytest.approx(dice_by_hand(logits, target), rel=1e-4)


def test_sums_of_losses_are_weighted_sums() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(2, 3, 4, 5, generator=generator).requires_grad_()
    target = torch.randint(0, 3, (2, 16, 20), generator=generator)
    target[:, :3] = 255
    parts = [CrossEntropy(), smp_loss("DiceLoss"), smp_loss("FocalLoss")]
    total = WeightedSum(parts, [1.0, 2.0, 0.5])
    large = torch.nn.functional.interpolate(low, (16, 20), mode="bilinear", align_corners=False)
    expected = sum(w * part(large, target) for part, w in zip(parts, [1, 2, 0.5], strict=True))
    for found in (total(large, target), total.on_upsampled(low, target)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(total.on_upsampled(low, target), low)[0]
    theirs = torch.autograd.grad(expected, low)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_other_numbers_of_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="2 losses and 1 weights"):
        WeightedSum([CrossEntropy(), CrossEntropy()], [1.0])
    with pytest.raises(ValueError, match="0 losses"):
        WeightedSum([])


@pytest.mark.parametrize("n_classes", [2, 3, 150])
@pytest.mark.parametrize("name", ["DiceLoss", "TverskyLoss", "FocalLoss", "LovaszLoss"])
def test_losses_that_count_ignored_pixels_are_refused(name: str, n_classes: int) -> None:
    refuse_unfit_loss(smp_loss(name), n_classes, 255)
    with pytest.raises(ValueError, match=rf"the loss {name} .*ignore_index"):
        refuse_unfit_loss(smp_loss(name, ignore_index=None), n_classes, 255)
    with pytest.raises(ValueError, match=rf"the loss {name} .*mode: multiclass"):
        refuse_unfit_loss(smp_loss(name, mode="binary"), n_classes, 255)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (CrossEntropy(class_weight=[1.0, 2.0]), "class_weight has 2 factors for 3 classes"),
        (CrossEntropy(ignore_index=254), "the value 255"),
        (torch.nn.CrossEntropyLoss(), "cannot take 3 classes and ignored pixels of 255"),
        (torch.nn.CrossEntropyLoss(ignore_index=255, reduction="none"), "one finite number"),
        (WeightedSum([CrossEntropy(), CrossEntropy(254)]), "the value 255"),
    ],
)
def test_unfit_losses_are_refused_before_training(loss: torch.nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_unfit_loss(loss, 3, 255)


def test_trying_a_loss_leaves_no_trace() -> None:
    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, logits: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return CrossEntropy()(logits, target)

    loss, seed = Counting(), torch.get_rng_state()
    refuse_unfit_loss(loss, 3, 255)
    assert loss.calls == 0
    assert torch.equal(seed, torch.get_rng_state())


def test_losses_can_be_tried_where_tensors_have_no_numbers() -> None:
    with torch.device("meta"):
        refuse_unfit_loss(CrossEntropy(class_weight=[1.0, 2.0, 3.0]), 3, 255)
        refuse_unfit_loss(CrossEntropy(), 3, 255)
    with pytest.raises(ValueError, match="counts ignored"), torch.device("meta"):
        refuse_unfit_loss(smp_loss("FocalLoss", ignore_index=None), 3, 255)
