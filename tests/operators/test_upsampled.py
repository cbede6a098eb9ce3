"""Loss and argmax of upsampled logits equal those of logits that were upsampled first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side import peak_bytes
from torch import Tensor

from seglab.losses import CrossEntropy
from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import FCNHead
from seglab.operators.resampling import Resampling
from seglab.operators.upsampled import (
    Stretch,
    upsampled_argmax,
    upsampled_log_likelihood,
    upsampled_nll,
)
from seglab.task import SegmentationTask

IGNORE = 255


def make(
    shape: tuple[int, ...] = (2, 5, 7, 6),
    size: tuple[int, int] = (25, 19),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Logits (B, K, h, w) and a target (B, H, W) of which a part is ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = IGNORE
    return logits.requires_grad_(), target


def upsample(logits: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"avg_non_ignore": True},
    {"class_weight": [0.5, 1, 2, 0, 3]},
    {"class_weight": [0.5, 1, 2, 1, 3], "avg_non_ignore": True},
    {"ohem_min_kept": 40},
    {"ohem_min_kept": 40, "ohem_thresh": 0.3},
    {"ohem_min_kept": 5000, "ohem_thresh": 0.7, "class_weight": [0.5, 1, 2, 1, 3]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradient_equal_those_after_upsampling(options: dict[str, Any]) -> None:
    logits, target = make()
    loss = CrossEntropy(IGNORE, **options).double()
    expected = loss(upsample(logits, target.shape[1:]), target)
    found = loss.on_upsampled(logits, target)
    assert abs(found - expected).item() < 1e-12
    (gradient,) = torch.autograd.grad(found * 3, logits)
    (wanted,) = torch.autograd.grad(expected * 3, logits)
    assert (gradient - wanted).abs().max() < 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    low=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    n_classes=st.integers(1, 6),
)
def test_any_sizes_agree(low: tuple[int, int], size: tuple[int, int], n_classes: int) -> None:
    logits, target = make((2, n_classes, *low), size)
    loss = CrossEntropy(IGNORE)
    expected = loss(upsample(logits, size), target)
    torch.testing.assert_close(
        torch.autograd.grad(loss.on_upsampled(logits, target), logits),
        torch.autograd.grad(expected, logits),
        rtol=1e-10,
        atol=1e-10,
    )


def test_float32_is_within_rounding() -> None:
    logits, target = make((1, 150, 16, 16), (64, 64), torch.float32)
    (found,) = torch.autograd.grad(CrossEntropy().on_upsampled(logits, target), logits)
    exact = logits.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(CrossEntropy()(upsample(exact, (64, 64)), target), exact)
    assert (found - wanted).abs().max() / wanted.abs().max() < 1e-6


def test_half_precision_logits_are_added_up_in_float32() -> None:
    logits, target = make(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = CrossEntropy().on_upsampled(logits, target)
    expected = CrossEntropy()(upsample(logits.float(), target.shape[1:]), target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found, logits)[0].dtype == torch.bfloat16


def test_everything_ignored_is_zero_with_zero_gradient() -> None:
    logits, target = make()
    for options in OPTIONS:
        loss = CrossEntropy(IGNORE, **options).on_upsampled(logits, torch.full_like(target, IGNORE))
        assert loss == 0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_label_outside_the_classes_is_refused() -> None:
    logits, target = make()
    target[0, 0, 0] = 77
    with pytest.raises((IndexError, RuntimeError), match="77"):
        CrossEntropy().on_upsampled(logits, target)


def test_second_derivatives_are_exact() -> None:
    logits, target = make((1, 3, 2, 3), (4, 5))
    loss = CrossEntropy(IGNORE)
    assert torch.autograd.gradgradcheck(lambda x: loss.on_upsampled(x, target), (logits,))


@pytest.mark.parametrize(
    "how",
    [
        Stretch(Resampling("nearest")),
        Stretch(Resampling(align_corners=True)),
        Stretch(through=(6, 15)),
        Stretch(Resampling(align_corners=True), through=(16, 4)),
    ],
    ids=str,
)
def test_other_ways_to_the_size_agree(how: Stretch) -> None:
    logits, target = make((2, 3, 4, 5), (9, 13))
    target = target.clamp_max(2)
    factor = torch.rand(target.shape, dtype=torch.float64)
    full = resized_twice(logits, how, (9, 13))
    expected = (F.cross_entropy(full, target, reduction="none") * factor).sum()
    assert abs(upsampled_nll(logits, target, factor, how) - expected).item() < 1e-10
    likelihood = upsampled_log_likelihood(logits, target, how)
    found = torch.autograd.grad(upsampled_nll(logits, target, factor, how), logits)[0]
    assert torch.allclose(found, torch.autograd.grad(expected, logits)[0], rtol=1e-10, atol=1e-10)
    assert torch.allclose(likelihood, -F.cross_entropy(full, target, reduction="none"))
    assert torch.equal(upsampled_argmax(logits, (9, 13), how), full.argmax(1).to(torch.uint8))


def resized_twice(logits: Tensor, how: Stretch, size: tuple[int, int]) -> Tensor:
    first = {"mode": how.resampling.mode}
    if how.resampling.mode == "bilinear":
        first["align_corners"] = how.resampling.align_corners
    middle = F.interpolate(logits, size=how.through or size, **first)
    return upsample(middle, size)


def test_argmax_has_room_for_many_classes() -> None:
    logits, _ = make((1, 300, 3, 3), (9, 9))
    labels = upsampled_argmax(logits, (9, 9))
    assert labels.dtype == torch.int64
    assert torch.equal(labels, upsample(logits, (9, 9)).argmax(1))


def test_compiles_as_one_graph() -> None:
    logits, target = make()
    loss = CrossEntropy(IGNORE)
    compiled = torch.compile(loss.on_upsampled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(logits, target), logits),
        torch.autograd.grad(loss.on_upsampled(logits, target), logits),
    )
    torch.compiler.reset()


def test_no_tensor_of_full_size_is_made() -> None:
    logits, target = make((1, 150, 64, 64), (256, 256), torch.float32)
    full = 150 * 256 * 256 * 4
    loss = CrossEntropy()
    loss.on_upsampled(logits, target).backward()  # matrices are cached now
    found = peak_bytes(lambda: loss.on_upsampled(logits, target).backward())
    plain = peak_bytes(lambda: loss(upsample(logits, (256, 256)), target).backward())
    assert plain > 2 * full
    assert found < full / 3


@pytest.mark.parametrize("size", [(32, 32), (50, 41)])
def test_evaluation_is_that_of_logits_stretched_to_image_then_label(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder("resnet18")
    network = Segmenter(encoder, FCNHead(encoder.channels, 5, channels=8, in_index=0))
    batch = {
        "image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "mask": make((2, 5, 2, 2), size)[1],
    }
    task = SegmentationTask(network, num_classes=5).eval()
    with torch.no_grad():
        full = upsample(upsample(network.decode(batch["image"])[0], (32, 32)), size)
        found = task.validation_step(batch, 0)["prediction"]
    assert (found == full.argmax(1)).float().mean() > 0.999  # ties within rounding
    expected = CrossEntropy()(full, batch["mask"].long())
    torch.testing.assert_close(task.losses["val"].compute(), expected)
