"""BiFPN and its head: counts typed from the architecture, hand-made sums, odd and tiny sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from context import rows_that_reach
from scale_equalization import find_fusions
from torch import Tensor, nn

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import BiFPNHead
from seglab.models.necks import BiFPN
from seglab.models.necks.bifpn import plan_cell
from seglab.models.necks.blocks import pool_to

B0 = (24, 40, 112, 320)
B3 = (32, 48, 136, 384)
B4 = (32, 56, 160, 448)
B5 = (40, 64, 176, 512)
CHANNELS = (4, 6, 8, 10)


def pyramid_inputs(height: int, width: int, batch: int = 1, grad: bool = False) -> list[Tensor]:
    """Random encoder features of an image of this size, halved by rounding up."""
    generator = torch.Generator().manual_seed(height * width)
    return [
        torch.randn(
            batch, c, -(-height // 2**i), -(-width // 2**i), generator=generator, requires_grad=grad
        )
        for c, i in zip(CHANNELS, (2, 3, 4, 5), strict=True)
    ]


@pytest.mark.parametrize(
    ("channels", "width", "repeats", "levels", "with_bias", "without"),
    [
        (B0, 64, 3, (3, 7), 196_281, 194_361),
        (B0, 64, 3, (2, 9), 288_358, 285_158),
        (B0, 64, 3, (3, 9), 254_679, 251_991),
        (B0, 64, 3, (2, 7), 229_960, None),
        (B0, 64, 3, (2, 5), 150_890, None),
        (B0, 88, 4, (2, 9), 608_392, 602_760),
        (B0, 88, 4, (3, 9), 531_812, 527_060),
        (B0, 88, 4, (2, 7), 467_552, None),
        (B0, 88, 4, (2, 5), 298_288, None),
        (B3, 96, 4, (2, 9), 732_040, 725_896),
        (B3, 96, 4, (3, 9), 640_820, 635_636),
        (B3, 96, 4, (2, 7), 566_112, None),
        (B3, 96, 4, (2, 5), 363_032, None),
        (B4, 128, 3, (2, 9), 987_238, 980_838),
        (B4, 128, 3, (3, 9), 867_671, 862_295),
        (B4, 128, 3, (2, 7), 772_168, None),
        (B4, 128, 3, (2, 5), 499_370, None),
        (B5, 160, 6, (2, 9), 2_644_684, 2_629_964),
        (B5, 160, 6, (3, 9), 2_296_814, 2_284_334),
        (B5, 160, 6, (2, 7), 1_984_144, None),
        (B5, 160, 6, (2, 5), 1_241_204, None),
    ],
)
def test_pyramid_has_efficientdets_parameter_count(
    channels: tuple[int, ...],
    width: int,
    repeats: int,
    levels: tuple[int, int],
    with_bias: int,
    without: int | None,
) -> None:
    for bias, count in ((True, with_bias), (False, without)):
        with torch.device("meta"):
            neck = BiFPN(channels, width, repeats, levels, bias=bias)
        if count is not None:
            assert sum(p.numel() for p in neck.parameters()) == count


def test_efficientdets_segmentation_network_has_its_size() -> None:
    """EfficientNet-B4, P2 to P7 of 128 channels, head of 256, each three times, 21 classes."""
    with torch.device("meta"):
        head = BiFPNHead(B4, 21, 128, 3, (2, 7), head_channels=256, head_repeats=3)
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in head.named_children()}
    assert count["convs"] + count["conv_seg"] == 177_301
    encoder = TimmEncoder("tf_efficientnet_b4")
    encoder_size = sum(p.numel() for p in encoder.parameters())
    # Published: 17.7 M; the merge of levels (6 edge weights) is ours.
    assert encoder_size + sum(count.values()) - count["merge"] == 17_691_685


def test_nodes_of_five_levels_are_efficientdets() -> None:
    plans = plan_cell(5)
    assert [list(plan.inputs) for plan in plans] == [
        [3, 4], [2, 5], [1, 6], [0, 7], [1, 7, 8], [2, 6, 9], [3, 5, 10], [4, 11],
    ]  # fmt: skip
    assert [plan.level for plan in plans] == [3, 2, 1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("n_levels", range(2, 9))
def test_every_node_is_read_or_returned(n_levels: int) -> None:
    for finest_only in (False, True):
        plans = plan_cell(n_levels, finest_only)
        assert len(plans) == (n_levels - 1) * (1 if finest_only else 2)
        edges = sum(len(plan.inputs) for plan in plans)
        assert edges == (2 * (n_levels - 1) if finest_only else 5 * n_levels - 6)
        read = {i for plan in plans for i in plan.inputs}
        last = {plan.level: n_levels + index for index, plan in enumerate(plans)}
        returned = {last[0]} if finest_only else set(last.values())
        assert read | returned == set(range(n_levels + len(plans)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 2048), [(n, 2 * n) for n in (256, 128, 64, 32, 16, 8, 4, 2)]),
        ((512, 1024), [(n, 2 * n) for n in (128, 64, 32, 16, 8, 4, 2, 1)]),
        ((769, 769), [(n, n) for n in (193, 97, 49, 25, 13, 7, 4, 2)]),
        ((512, 512), [(n, n) for n in (128, 64, 32, 16, 8, 4, 2, 1)]),
        ((33, 250), [(9, 63), (5, 32), (3, 16), (2, 8), (1, 4), (1, 2), (1, 1), (1, 1)]),
    ],
)  # fmt: skip
def test_levels_halve_by_rounding_up(
    size: tuple[int, int], expected: list[tuple[int, int]]
) -> None:
    neck = BiFPN(CHANNELS, 8, repeats=2).eval()
    with torch.no_grad():
        maps = neck(pyramid_inputs(*size))
    assert [tuple(x.shape) for x in maps] == [(1, 8, *s) for s in expected]
    assert all(x.isfinite().all() for x in maps)


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "convnext_atto", "resnet18"])
@pytest.mark.parametrize("size", [(97, 161), (64, 64)])
def test_logits_have_the_size_of_the_image(encoder: str, size: tuple[int, int]) -> None:
    # ConvNeXt halves odd sizes by rounding down.
    head = partial(BiFPNHead, channels=8, repeats=2)
    network = Segmenter(TimmEncoder(encoder), head, num_classes=5).eval()
    with torch.no_grad():
        logits = network(torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8))
    assert logits.shape == (1, 5, *size)
    assert logits.isfinite().all()


def test_dilated_encoder_keeps_equal_levels_unpooled() -> None:
    encoder = TimmEncoder("resnet18", output_stride=16)
    neck = BiFPN(encoder.channels, 8, levels=(2, 6)).eval()
    maps = neck(encoder.eval()(torch.zeros(1, 3, 64, 96)))
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (4, 6), (2, 3)]


@pytest.mark.parametrize(("length", "wanted"), [(5, 3), (6, 3), (2, 1), (1, 1), (9, 3), (7, 7)])
def test_pooling_is_tensorflows_same(length: int, wanted: int) -> None:
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    stride = -(-length // wanted)
    window = stride + 1 if stride > 1 else 1
    before = max((wanted - 1) * stride + window - length, 0) // 2
    expected = [
        max(float(values[t]) for t in range(s, s + window) if 0 <= t < length)
        for s in range(-before, -before + wanted * stride, stride)
    ]
    along = pool_to(values.view(1, 1, 1, length), (1, wanted)).flatten().tolist()
    down = pool_to(values.view(1, 1, length, 1), (wanted, 1)).flatten().tolist()
    assert along == down == expected


def test_node_computes_what_its_parts_say() -> None:
    """Activation, depthwise, pointwise, normalization, in this order, on the weighted sum."""
    torch.manual_seed(0)
    neck = BiFPN((4, 6), 6, repeats=1, levels=(2, 3)).double().eval()
    for parameter in neck.parameters():
        nn.init.normal_(parameter)
    fine, coarse = (torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((4, 5), (6, 3)))
    state = neck.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{key}"].view(-1, 1, 1)
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * weight + bias

    def after(x: Tensor, name: str) -> Tensor:
        x = x * torch.sigmoid(x)
        x = F.conv2d(x, state[f"{name}.conv.0.weight"], padding=1, groups=6)
        x = F.conv2d(x, state[f"{name}.conv.1.weight"], state[f"{name}.conv.1.bias"])
        return norm(x, f"{name}.conv.2")

    def weights(name: str) -> Tensor:
        raw = state[f"{name}.fuse.edge_weights"].clamp(min=0)
        return raw / (raw.sum() + 1e-4)

    lateral = "cells.0.nodes.0.projections.0"
    projected = F.conv2d(fine, state[f"{lateral}.0.weight"], state[f"{lateral}.0.bias"])
    projected = norm(projected, f"{lateral}.1")
    nearest = coarse[:, :, [0, 0, 1, 1, 2]][:, :, :, [0, 0, 1, 1, 2]]
    a, b = weights("cells.0.nodes.0")
    down = after(a * projected + b * nearest, "cells.0.nodes.0")
    pooled = F.max_pool2d(F.pad(down, (1, 1, 1, 1), value=-torch.inf), 3, 2)
    a, b = weights("cells.0.nodes.1")
    up = after(a * coarse + b * pooled, "cells.0.nodes.1")
    found = neck([fine, coarse])
    torch.testing.assert_close(found[0], down, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], up, rtol=0, atol=1e-12)


def spread(levels: tuple[int, int]) -> int:
    """Rows of P5 that reach the middle pixel of the pyramid's finest map."""
    torch.manual_seed(0)
    neck = BiFPN(CHANNELS, 4, 1, levels).eval()
    inputs = pyramid_inputs(2048, 128, grad=True)
    neck(inputs)[0][0, :, inputs[0].shape[2] // 2, 8].square().sum().backward()
    assert inputs[3].grad is not None
    rows = (inputs[3].grad.abs().sum((0, 1, 3)) > 0).nonzero()
    return int(rows.max() - rows.min()) + 1


def rows_by_arithmetic(coarsest: int) -> int:
    """Rows of P5 below the middle one of P2: what 3x3 convolutions and poolings reach in a cell."""

    def pooled_from(rows: set[int], level: int) -> set[int]:
        for finer in range(level - 1, 4, -1):  # window 3, stride 2, padded at the end
            rows = {2 * r + d for r in rows for d in (0, 1, 2)} & set(range(2048 >> finer))
        return rows

    rows, reached = {256}, set()
    for level in range(2, coarsest):
        rows = {r + d for r in rows for d in (-1, 0, 1)} & set(range(2048 >> level))
        reached |= pooled_from(rows, level) if level >= 5 else set()
        rows = {r // 2 for r in rows}  # nearest neighbour from the level above
    return len(reached | pooled_from(rows, coarsest))


def test_receptive_field_grows_with_every_level() -> None:
    rows = [rows_that_reach(top) for top in (5, 6, 7, 8, 9)]
    assert rows == [rows_by_arithmetic(top) for top in (5, 6, 7, 8, 9)]
    assert rows == [2, 5, 11, 23, 47]
    # The gradient sees the rows that won the maximum, so at most these, and more with every level.
    by_gradient = [spread((2, top)) for top in (5, 6, 7, 8, 9)]
    assert all(a < b for a, b in itertools.pairwise(by_gradient)), by_gradient
    assert all(a <= b for a, b in zip(by_gradient, rows, strict=True)), by_gradient


@pytest.mark.parametrize("merge", ["bilinear", "nearest", "concat", "finest"])
@pytest.mark.parametrize("weighted", [True, False])
def test_every_parameter_of_each_form_is_trained(merge: Any, weighted: bool) -> None:
    head = BiFPNHead(CHANNELS, 5, channels=8, repeats=2, merge=merge, weighted=weighted)
    head(pyramid_inputs(64, 96, batch=2)).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_finest_level_does_not_need_the_last_way_up() -> None:
    torch.manual_seed(0)
    full = BiFPN(CHANNELS, 8, repeats=2).eval()
    pruned = BiFPN(CHANNELS, 8, repeats=2, finest_only=True).eval()
    kept = pruned.state_dict().keys()
    pruned.load_state_dict({k: v for k, v in full.state_dict().items() if k in kept})
    features = pyramid_inputs(70, 100)
    (found,) = pruned(features)
    assert torch.equal(found, full(features)[0])


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_merge_is_a_weighted_sum_at_the_finest_size(mode: Any) -> None:
    torch.manual_seed(0)
    head = BiFPNHead(CHANNELS, 5, channels=8, repeats=1, levels=(2, 6), merge=mode).eval()
    nn.init.uniform_(head.merge.edge_weights, -1, 2)
    levels = head.bifpn(pyramid_inputs(70, 100))
    raw = head.merge.edge_weights.clamp(min=0)
    size = levels[0].shape[-2:]
    expected = sum(
        w * F.interpolate(x, size, mode=mode) for w, x in zip(raw, levels, strict=True)
    ) / (raw.sum() + 1e-4)
    torch.testing.assert_close(head.merge(levels), expected)


def test_concatenating_merge_is_one_fusion_of_all_levels() -> None:
    head = partial(BiFPNHead, channels=8, repeats=1, levels=(2, 6), merge="concat")
    network = Segmenter(TimmEncoder("test_resnet"), head, num_classes=5)
    (fusion,) = find_fusions(network, torch.zeros(2, 3, 64, 64))
    assert fusion.name == "decode_head.merge.conv"
    assert [branch.upsampling for branch in fusion.branches] == [1, 2, 4, 8, 16]


def test_tiny_level_trains_on_two_images_and_names_the_cure_for_one() -> None:
    head = BiFPNHead(CHANNELS, 5, channels=8, repeats=1)
    head(pyramid_inputs(64, 64, batch=2)).sum().backward()
    with pytest.raises(ValueError, match=r"level of 1 x 1 pixels.*batch size of at least 2"):
        head(pyramid_inputs(64, 64))
    assert head.eval()(pyramid_inputs(64, 64)).shape == (1, 5, 16, 16)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(BiFPN, levels=(6, 9)), r"levels=\(6, 9\) .* with P2 to P5"),
        (partial(BiFPN, levels=(1, 9)), "the first must be one of these"),
        (partial(BiFPN, levels=(3, 3)), "the second above it"),
        (partial(BiFPN, repeats=0), "repeats >= 1, got 0"),
        (partial(BiFPNHead, num_classes=5, merge="mean"), "merge is .* got 'mean'"),
    ],
)  # fmt: skip
def test_impossible_pyramids_are_refused(build: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(CHANNELS)


def test_half_precision_stays_close() -> None:
    torch.manual_seed(0)
    head = BiFPNHead(CHANNELS, 5, channels=8, repeats=2).eval()
    features = pyramid_inputs(64, 64)
    expected = head(features)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(features)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.02)
