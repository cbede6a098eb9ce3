"""Loss and argmax of upsampled logits equal those of logits that were upsampled first."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from side_by_side import peak_bytes
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode

from seglab.losses import CrossEntropy
from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import FCNHead
from seglab.operators.logit_resize import LogitResize
from seglab.operators.resampling import Resampling
from seglab.operators.upsampled import upsampled_argmax, upsampled_log_likelihood, upsampled_nll
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


@pytest.mark.parametrize("options", [{}, {"class_weight": [1, 2, 3, 4, 5]}, {"ohem_min_kept": 4}])
@pytest.mark.parametrize("stray", [77, -100, -1, 5])
def test_label_outside_the_classes_is_refused(stray: int, options: dict[str, Any]) -> None:
    logits, target = make()
    target[0, 0, 0] = stray
    loss = CrossEntropy(**options)
    message = rf"holds the value {stray}, but the 5 classes are 0\.\.4 and only 255 is ignored"
    with pytest.raises(ValueError, match=message):
        loss.on_upsampled(logits, target)
    with pytest.raises(ValueError, match=message):
        loss(upsample(logits, target.shape[1:]), target)


def test_stray_label_is_refused_without_a_look_at_it() -> None:
    """As on a GPU: the kernel's own check, which torch skips for its default of -100."""
    logits, target = make()
    target[0, 0, 0] = -100
    with BaseTorchFunctionMode(), pytest.raises(IndexError, match="-100"):
        CrossEntropy()(upsample(logits, target.shape[1:]), target)
    with BaseTorchFunctionMode(), pytest.raises(IndexError, match="-100"):
        CrossEntropy().on_upsampled(logits, target)


def test_minus_hundred_is_ignored_where_it_is_the_ignore_index() -> None:
    logits, target = make()
    renamed = torch.where(target == IGNORE, -100, target)
    loss, as_usual = CrossEntropy(-100), CrossEntropy(IGNORE)
    full = upsample(logits, target.shape[1:])
    assert torch.equal(loss.on_upsampled(logits, renamed), as_usual.on_upsampled(logits, target))
    assert torch.equal(loss(full, renamed), as_usual(full, target))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("looked_at", [False, True])
def test_ignored_pixels_may_be_anything(
    options: dict[str, Any], poison: float, looked_at: bool
) -> None:
    """Of two networks one has non-finite logits, which only ignored pixels are made of."""
    logits, target = make()
    target[0, :13], target[1, :, 9:] = IGNORE, IGNORE
    poisoned = logits.detach().clone()
    poisoned[0, :, :3], poisoned[1, 2, :, 4:] = poison, poison
    poisoned.requires_grad_()
    loss = CrossEntropy(IGNORE, **options).double()
    mode = BaseTorchFunctionMode() if looked_at else nullcontext()
    with mode:
        found, expected = (loss.on_upsampled(x, target) for x in (poisoned, logits))
    assert abs(found - expected).item() < 1e-12
    (gradient,) = torch.autograd.grad(found, poisoned)
    assert (gradient - torch.autograd.grad(expected, logits)[0]).abs().max() < 1e-12
    assert not gradient[0, :, :3].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_class_masked_by_minus_infinity_has_no_part(options: dict[str, Any]) -> None:
    """Class 0, which also stands in for the ignored; oracle: the other classes alone."""
    logits, target = make()
    target = torch.where(target == 0, 4, target)
    masked = logits.detach().clone()
    masked[:, 0] = -torch.inf
    masked.requires_grad_()
    weights = options.get("class_weight")
    fewer = {**options, **({"class_weight": weights[1:]} if weights else {})}
    found = CrossEntropy(IGNORE, **options).double().on_upsampled(masked, target)
    expected = CrossEntropy(IGNORE, **fewer).double()(
        upsample(logits[:, 1:], target.shape[1:]), torch.where(target == IGNORE, IGNORE, target - 1)
    )
    assert abs(found - expected).item() < 1e-12
    gradient = torch.autograd.grad(found, masked)[0]
    wanted = torch.autograd.grad(expected, logits)[0]
    assert not gradient[:, 0].any()
    assert (gradient - wanted)[:, 1:].abs().max() < 1e-12
    labels = upsampled_argmax(masked, (25, 19))
    assert torch.equal(labels, upsample(logits[:, 1:], (25, 19)).argmax(1).add(1).byte())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nan_at_a_pixel_that_counts_is_not_hidden(options: dict[str, Any]) -> None:
    logits, target = make()
    target[0, 10:15, 8:11] = 1
    poisoned = logits.detach().clone()
    poisoned[0, :, 3, 2:4] = torch.nan
    poisoned.requires_grad_()
    loss = CrossEntropy(IGNORE, **options).double()
    found = loss.on_upsampled(poisoned, target)
    assert found.isnan()
    assert torch.autograd.grad(found, poisoned)[0].isnan().any()
    assert loss(upsample(poisoned, target.shape[1:]), target).isnan()


def test_second_derivatives_are_exact() -> None:
    logits, target = make((1, 3, 2, 3), (4, 5))
    loss = CrossEntropy(IGNORE)
    assert torch.autograd.gradgradcheck(lambda x: loss.on_upsampled(x, target), (logits,))


@pytest.mark.parametrize(
    "how",
    [
        LogitResize(Resampling("nearest")),
        LogitResize(Resampling(align_corners=True)),
        LogitResize(through=(6, 15)),
        LogitResize(Resampling(align_corners=True), through=(16, 4)),
    ],
    ids=str,
)
def test_other_ways_to_the_size_agree(how: LogitResize) -> None:
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


def resized_twice(logits: Tensor, how: LogitResize, size: tuple[int, int]) -> Tensor:
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
def test_evaluation_is_that_of_logits_resized_to_image_then_label(size: tuple[int, int]) -> None:
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
