"""`FusionConv2d` equals resize, concatenate, convolve: values, gradients, second gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seglab.models.heads import ASPPHead, FCNHead, Head, PSPHead, SepASPPHead, UPerHead
from seglab.operators.fusion_conv import FusionConv2d, resize

SIZE = (13, 18)
BRANCHES = ((4, *SIZE), (3, 5, 6), (2, 1, 1), (5, 26, 9))  # same, coarser, one pixel, finer
BILINEAR = {"mode": "bilinear", "align_corners": False}
ALIGNED = {"mode": "bilinear", "align_corners": True}
NEAREST = {"mode": "nearest"}


def reference(
    conv: nn.Conv2d, branches: Sequence[Tensor], size: tuple[int, int], how: dict[str, Any]
) -> Tensor:
    """What fusion means, with torch's own operations on ordinary tensors."""
    maps = torch.cat([F.interpolate(branch, size=size, **how) for branch in branches], dim=1)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return F.conv2d(maps, conv.weight, conv.bias, *geometry)


def random_branches(
    shapes: Sequence[tuple[int, ...]] = BRANCHES,
    dtype: torch.dtype = torch.float64,
    n_images: int = 2,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n_images, *shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]


def gradients(conv: nn.Module, branches: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return list(torch.autograd.grad(y, [*branches, *conv.parameters()], direction))


def relative_error(found: Tensor, expected: Tensor) -> float:
    truth = expected.detach().double()
    distance = (found.detach().double() - truth).abs().max()
    return float(distance / truth.abs().max())


@pytest.mark.parametrize("how", [BILINEAR, ALIGNED, NEAREST], ids=["bilinear", "aligned", "near"])
@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "bias": False},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": 3, "padding": 4, "dilation": 4},
        {"kernel_size": (3, 1), "padding": (1, 0)},
        {"kernel_size": 3, "padding": 0, "stride": 2},
        {"kernel_size": 2, "padding": 3, "stride": (1, 2), "dilation": (2, 1)},
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_plain_way(
    window: dict[str, Any], how: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    conv = FusionConv2d(14, 6, **window, **how, force="fused").double()
    branches = random_branches()
    fused, expected = conv(branches, SIZE), reference(conv, branches, SIZE, how)
    assert relative_error(fused, expected) < 1e-12
    pairs = zip(gradients(conv, branches, fused), gradients(conv, branches, expected), strict=True)
    assert all(relative_error(found, wanted) < 1e-12 for found, wanted in pairs)


def test_equals_loops_over_pixels_and_taps() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 2))
    conv = FusionConv2d(2, 2, 3, padding=1, bias=False, force="fused").double()
    found = conv([torch.from_numpy(x)[None]], (5, 7))[0].detach().numpy()
    expected = convolve_loop(bilinear_loop(x, (5, 7)), conv.weight.detach().numpy())
    assert np.abs(found - expected).max() < 1e-13


def bilinear_loop(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (C, h, w) pixel by pixel: half-pixel centres, clamped at the border."""
    out = np.empty((len(x), *size))
    for p, q in np.ndindex(size):
        top, bottom, down = neighbours(p, x.shape[1], size[0])
        left, right, along = neighbours(q, x.shape[2], size[1])
        above = (1 - along) * x[:, top, left] + along * x[:, top, right]
        below = (1 - along) * x[:, bottom, left] + along * x[:, bottom, right]
        out[:, p, q] = (1 - down) * above + down * below
    return out


def neighbours(position: int, n_in: int, n_out: int) -> tuple[int, int, float]:
    source = max((position + 0.5) * n_in / n_out - 0.5, 0.0)
    first = min(int(source), n_in - 1)
    return first, min(first + 1, n_in - 1), source - first


def convolve_loop(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Convolve (C, H, W) with (O, C, 3, 3), zeros beyond the border."""
    height, width = x.shape[1:]
    out = np.zeros((len(weight), height, width))
    for p, q in np.ndindex(height, width):
        for (o, c, ky, kx), factor in np.ndenumerate(weight):
            y, z = p + ky - 1, q + kx - 1
            if 0 <= y < height and 0 <= z < width:
                out[o, p, q] += factor * x[c, y, z]
    return out


sides = st.integers(1, 40)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(sides, sides),
    shapes=st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=4),
    kernel=st.sampled_from([1, 3, 5]),
    dilation=st.integers(1, 3),
    n_images=st.integers(1, 2),
    how=st.sampled_from([BILINEAR, ALIGNED, NEAREST]),
)
def test_any_sizes_ratios_and_branches_agree(
    size: tuple[int, int],
    shapes: list[tuple[int, int, int]],
    kernel: int,
    dilation: int,
    n_images: int,
    how: dict[str, Any],
) -> None:
    window = {"kernel_size": kernel, "dilation": dilation, "padding": dilation * (kernel // 2)}
    torch.manual_seed(0)
    conv = FusionConv2d(sum(s[0] for s in shapes), 3, **window, **how, force="fused").double()
    branches = random_branches(shapes, n_images=n_images)
    fused, expected = conv(branches, size), reference(conv, branches, size, how)
    torch.testing.assert_close(fused, expected, rtol=1e-10, atol=1e-10)
    found, wanted = gradients(conv, branches, fused), gradients(conv, branches, expected)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_float32_is_within_rounding_of_the_exact_result() -> None:
    shapes = ((32, 32, 32), (32, 16, 16), (32, 8, 8), (32, 3, 5))
    conv = FusionConv2d(128, 48, 3, padding=1, force="fused")
    branches = random_branches(shapes, torch.float32)
    fused = conv(branches)
    found = gradients(conv, branches, fused)
    exact = [branch.detach().double().requires_grad_() for branch in branches]
    expected = reference(conv.double(), exact, (32, 32), BILINEAR)
    assert relative_error(fused, expected) < 1e-6
    for gradient, wanted in zip(found, gradients(conv, exact, expected), strict=True):
        assert relative_error(gradient, wanted) < 2e-6


def test_half_precision_errs_no_more_than_the_plain_way() -> None:
    shapes = ((32, 32, 32), (32, 16, 16), (32, 8, 8), (32, 3, 5))
    conv = FusionConv2d(128, 48, 3, padding=1, bias=False)
    branches = random_branches(shapes, torch.bfloat16)
    results = {}
    for force in ("plain", "fused"):
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(branches, force=force)
        assert y.dtype == torch.bfloat16
        results[force] = [y, *gradients(conv, branches, y)]
    exact = [branch.detach().double().requires_grad_() for branch in branches]
    expected = reference(conv.double(), exact, (32, 32), BILINEAR)
    wanted = [expected, *gradients(conv, exact, expected)]
    for plain, fused, truth in zip(results["plain"], results["fused"], wanted, strict=True):
        errors = [
            (x.detach().double() - truth.detach()).square().mean().sqrt() for x in (plain, fused)
        ]
        assert errors[1] <= errors[0]


def test_second_derivatives_are_exact() -> None:
    conv = FusionConv2d(3, 2, 3, padding=1, force="fused").double()
    fine, coarse = random_branches(((1, 4, 5), (2, 2, 3)), n_images=1)

    def fuse(fine: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(conv, parameters, ([fine, coarse],))

    inputs = (fine, coarse, conv.weight, conv.bias)
    assert torch.autograd.gradcheck(fuse, inputs)
    assert torch.autograd.gradgradcheck(fuse, inputs)


def test_second_derivatives_follow_a_branch_made_from_another_once() -> None:
    conv = FusionConv2d(4, 2, 3, padding=1).double()
    (x,) = random_branches(((2, 8, 8),))
    found = {}
    for force in ("plain", "fused"):
        y = conv([x, F.avg_pool2d(x, 2).square()], force=force)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found[force] = torch.autograd.grad(slope.square().sum(), [x, conv.weight])
    torch.testing.assert_close(found["fused"], found["plain"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", ["branches", "weight"])
def test_only_wanted_gradients_are_made(frozen: str) -> None:
    conv = FusionConv2d(4, 2, 3, padding=1, force="fused")
    branches = random_branches(((2, 8, 8), (2, 4, 4)), torch.float32)
    for tensor in branches if frozen == "branches" else [conv.weight]:
        tensor.requires_grad_(False)
    conv(branches).sum().backward()
    assert (conv.weight.grad is None) == (frozen == "weight")
    assert all((x.grad is None) == (frozen == "branches") for x in branches)


def test_nothing_of_full_size_is_kept_for_the_backward_pass() -> None:
    kept = {}
    for force in ("plain", "fused"):
        conv = FusionConv2d(4 * 8, 8, 3, padding=1, force=force)
        shapes = ((8, 64, 64), (8, 32, 32), (8, 16, 16), (8, 8, 8))
        branches = random_branches(shapes, torch.float32)
        ours = {branch.data_ptr() for branch in [*branches, conv.weight]}
        sizes: dict[int, int] = {}

        def keep(x: Tensor, sizes: dict[int, int] = sizes, ours: set[int] = ours) -> Tensor:
            if x.data_ptr() not in ours:
                sizes[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            conv(branches)
        kept[force] = sum(sizes.values())
    assert kept["plain"] >= 2 * 32 * 64 * 64
    assert kept["fused"] <= conv.weight.numel()


@pytest.mark.parametrize("factory", [UPerHead, PSPHead, ASPPHead, SepASPPHead, FCNHead])
def test_heads_give_the_same_either_way(factory: type[Head]) -> None:
    torch.manual_seed(0)
    head = factory((8, 12, 16, 20), 5, channels=8).double().eval()
    features = random_branches(((8, 17, 23), (12, 9, 12), (16, 5, 6), (20, 3, 3)))
    found = {}
    for force in ("plain", "fused"):
        for module in head.modules():
            if isinstance(module, FusionConv2d) and module.groups == 1:
                module.force = force
        y = head(features)
        found[force] = [y, *torch.autograd.grad(y.sin().sum(), list(head.parameters()))]
    torch.testing.assert_close(found["fused"], found["plain"], rtol=1e-10, atol=1e-10)


def test_resize_leaves_equal_sizes_untouched() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert resize(x, (3, 4)) is x


def test_groups_of_images_add_up_in_the_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from seglab.operators import fused_conv

    monkeypatch.setattr(fused_conv, "PRODUCT_BYTES", 1)  # one image at a time
    conv = FusionConv2d(14, 6, 3, padding=1, force="fused").double()
    branches = random_branches(n_images=3)
    fused, expected = conv(branches, SIZE), reference(conv, branches, SIZE, BILINEAR)
    pairs = zip(gradients(conv, branches, fused), gradients(conv, branches, expected), strict=True)
    assert all(relative_error(found, wanted) < 1e-12 for found, wanted in pairs)


@pytest.mark.parametrize("trained", [["bias"], ["weight"], ["bias", "weight"]])
def test_second_derivatives_need_only_what_is_trained(trained: list[str]) -> None:
    conv = FusionConv2d(4, 2, 3, padding=1).double()
    for name, parameter in conv.named_parameters():
        parameter.requires_grad_(name in trained)
    branches = [x.detach() for x in random_branches(((2, 8, 8), (2, 4, 4)))]
    leaves = [p for p in conv.parameters() if p.requires_grad]
    found = {}
    for force in ("plain", "fused"):
        loss = conv(branches, force=force).pow(3).sum()
        slopes = torch.autograd.grad(loss, leaves, create_graph=True)
        found[force] = torch.autograd.grad(sum(x.square().sum() for x in slopes), leaves)
    torch.testing.assert_close(found["fused"], found["plain"], rtol=1e-10, atol=1e-10)


def test_flop_counters_count_the_plain_convolution() -> None:
    conv = FusionConv2d(4 + 2, 3, 3, padding=1)
    for first, last in ((8, 8), (8, 4)):
        counts = {}
        for force in ("plain", "fused"):
            branches = random_branches(((4, first, first), (2, last, last)), torch.float32)
            with FlopCounterMode(display=False) as counter:
                y = conv(branches, (8, 8), force=force)
                forward = counter.get_total_flops()
                y.sum().backward()
            counts[force] = forward, counter.get_total_flops()
        assert counts["fused"] == counts["plain"]
        assert counts["fused"][0] == 2 * 2 * 8 * 8 * 9 * 6 * 3
