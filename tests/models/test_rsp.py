"""Cross-scale attention against loops over pixels, and the head around it."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from context import floats_kept
from scale_equalization import find_fusions
from torch import Tensor, nn

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import RSPHead
from seglab.models.heads.rsp import RelationalSemanticsExtractor, RelationalSemanticsPropagator
from seglab.models.necks import BiFPN

Array = np.ndarray[Any, Any]
CHANNELS = (8, 12, 16, 20)


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def extractor(window: int = 3, seed: int = 0, **options: Any) -> RelationalSemanticsExtractor:
    """8 channels, 4 of keys, 2 heads, float64, everything random."""
    torch.manual_seed(seed)
    module = RelationalSemanticsExtractor(8, 4, window, 2, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def maps(fine: tuple[int, int], coarse: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return draw(2, 8, *fine), draw(2, 8, *coarse)


def pointwise(module: RelationalSemanticsExtractor, name: str, x: Array) -> Array:
    conv = module.get_submodule(name)
    weight, bias = (p.detach().numpy() for p in conv.parameters())
    return np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x) + bias[:, None, None]


def loops(module: RelationalSemanticsExtractor, fine: Tensor, coarse: Tensor) -> Array:
    """The definition, one pixel, head and neighbour at a time."""
    q = pointwise(module, "query", fine.numpy())
    k, v = (pointwise(module, name, coarse.numpy()) for name in ("key", "value"))
    radius, heads = module.window // 2, module.attention_heads
    reach = range(-radius, radius + 1)
    # Every distance between a fine pixel and a neighbour, in coarse pixels, in ascending order.
    distances = sorted({d - ((i + 0.5) / 2 - 0.5 - i // 2) for d in reach for i in (0, 1)})
    assert len(distances) == 2 * module.window
    table = None if module.position is None else module.position.detach().numpy()
    context = np.zeros(fine.shape)
    per_head, wide = k.shape[1] // heads, v.shape[1] // heads
    (height, width), (rows, columns) = fine.shape[-2:], coarse.shape[-2:]
    for b, m, i, j in itertools.product(range(len(q)), range(heads), range(height), range(width)):
        keys, values = slice(m * per_head, (m + 1) * per_head), slice(m * wide, (m + 1) * wide)
        scores, neighbours = [], []
        for dy, dx in itertools.product(reach, reach):
            y, x = i // 2 + dy, j // 2 + dx
            if not (0 <= y < rows and 0 <= x < columns):
                continue
            score = q[b, keys, i, j] @ k[b, keys, y, x] / math.sqrt(per_head)
            if table is not None:
                vertical = distances.index(y - ((i + 0.5) / 2 - 0.5))
                horizontal = distances.index(x - ((j + 0.5) / 2 - 0.5))
                score += table[m, vertical, horizontal]
            scores.append(score)
            neighbours.append(v[b, values, y, x])
        weights = np.exp(np.array(scores) - max(scores))
        context[b, values, i, j] = weights / weights.sum() @ np.array(neighbours)
    return pointwise(module, "output", context)


@pytest.mark.parametrize("window", [1, 3, 5, 7])
@pytest.mark.parametrize("use_position", [True, False])
@pytest.mark.parametrize("sizes", [((6, 10), (3, 5)), ((5, 9), (3, 5)), ((1, 2), (1, 1))])
def test_extractor_equals_loops_over_pixels(
    window: int, use_position: bool, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    module = extractor(window, use_position=use_position)
    fine, coarse = maps(*sizes)
    found = module(fine, coarse).detach().numpy()
    np.testing.assert_allclose(found, loops(module, fine, coarse), rtol=0, atol=1e-10)


def test_channels_last_maps_give_the_same() -> None:
    module, (fine, coarse) = extractor(), maps((6, 10), (3, 5))
    expected = module(fine, coarse)
    last = (x.to(memory_format=torch.channels_last) for x in (fine, coarse))
    torch.testing.assert_close(module(*last), expected)


def identity_(conv: nn.Conv2d) -> None:
    with torch.no_grad():
        conv.weight.copy_(torch.eye(8)[:, :, None, None])
        conv.bias.zero_()


def uniform_extractor(window: int, **options: Any) -> RelationalSemanticsExtractor:
    """Zero queries and positions; values and output pass as they are."""
    module = extractor(window, **options)
    identity_(module.value)
    identity_(module.output)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("query", "position")):
                parameter.zero_()
    return module


@pytest.mark.parametrize("relation", ["attention", "uniform"])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_without_preference_context_is_the_mean_of_the_window(window: int, relation: Any) -> None:
    fine, coarse = maps((6, 9), (3, 5))
    found = uniform_extractor(window, relation=relation)(fine, coarse)
    radius = window // 2
    for i, j in itertools.product(range(6), range(9)):
        region = coarse[
            :,
            :,
            max(i // 2 - radius, 0) : i // 2 + radius + 1,
            max(j // 2 - radius, 0) : j // 2 + radius + 1,
        ]
        torch.testing.assert_close(found[:, :, i, j], region.mean((2, 3)))


def test_window_of_one_is_nearest_upsampling() -> None:
    module, (fine, coarse) = extractor(window=1), maps((6, 10), (3, 5))
    identity_(module.value)
    identity_(module.output)
    torch.testing.assert_close(module(fine, coarse), F.interpolate(coarse, scale_factor=2))


def test_bilinear_relation_is_bilinear_upsampling() -> None:
    module, (fine, coarse) = extractor(relation="bilinear"), maps((6, 9), (3, 5))
    identity_(module.value)
    identity_(module.output)
    torch.testing.assert_close(module(fine, coarse), F.interpolate(coarse, (6, 9), mode="bilinear"))


@pytest.mark.parametrize("window", [1, 3, 5])
def test_coarse_pixel_reaches_only_windows_around_it(window: int) -> None:
    module, (fine, coarse) = extractor(window), maps((12, 14), (6, 7))
    other = coarse.clone()
    u, v = 2, 4
    other[:, :, u, v] += 1
    changed = (module(fine, other) != module(fine, coarse)).any(1).any(0)
    rows, columns = (torch.arange(n) // 2 for n in (12, 14))
    near = ((rows - u).abs()[:, None] <= window // 2) & ((columns - v).abs() <= window // 2)
    assert torch.equal(changed, near)


def test_four_pixels_of_a_cell_differ_only_by_query_and_position() -> None:
    fine, coarse = maps((3, 5), (3, 5))
    same = fine.repeat_interleave(2, 2).repeat_interleave(2, 3)
    plain = extractor(use_position=False)(same, coarse)
    cells = plain.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    torch.testing.assert_close(cells, cells[..., :1].expand_as(cells))
    placed = extractor()(same, coarse).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    assert not torch.allclose(placed, placed[..., :1].expand_as(placed))


@pytest.mark.parametrize("window", [1, 3, 7])
def test_weights_sum_to_one_and_vanish_outside(window: int) -> None:
    module, (fine, coarse) = extractor(window), maps((5, 9), (3, 5))
    weights = module.attention(fine, coarse)
    assert weights.shape == (2, 2, window**2, 4, 3, 5)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 2, 4, 3, 5, dtype=torch.float64))
    radius = window // 2
    for index, (y, x) in enumerate(itertools.product(range(3), range(5))):
        places = weights[..., index // 5, index % 5].unflatten(2, (window, window))
        for dy, dx in itertools.product(range(window), range(window)):
            inside = 0 <= y + dy - radius < 3 and 0 <= x + dx - radius < 5
            assert bool((places[:, :, dy, dx] > 0).all()) == inside
            assert inside or not places[:, :, dy, dx].any()


def test_map_rounded_down_repeats_its_last_row() -> None:
    module, (fine, coarse) = extractor(), maps((7, 9), (3, 4))
    repeated = F.pad(coarse, (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(module(fine, coarse), module(fine, repeated))


@pytest.mark.parametrize("size", [(6, 10), (4, 5), (2, 5), (3, 6)])
def test_coarse_map_of_another_size_is_refused(size: tuple[int, int]) -> None:
    fine, coarse = maps((6, 10), size)
    with pytest.raises(ValueError, match=r"half the size .* \(6, 10\).*output_stride 32"):
        extractor()(fine, coarse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_stays_finite_and_close(dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    module = RelationalSemanticsExtractor(16, 8, 3, 2)
    nn.init.normal_(module.position)
    fine, coarse = torch.randn(1, 16, 7, 9), torch.randn(1, 16, 4, 5)
    expected = module(fine, coarse)
    if autocast:
        with torch.autocast("cpu", dtype):
            found = module(fine, coarse)
    else:
        found = module.to(dtype)(fine.to(dtype), coarse.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    found.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_gradients_equal_finite_differences() -> None:
    module, (fine, coarse) = extractor(), maps((3, 4), (2, 2))
    fine, coarse = fine[:1].requires_grad_(), coarse[:1].requires_grad_()
    torch.autograd.gradcheck(module, (fine, coarse))
    position = module.position.detach().clone().requires_grad_()
    torch.autograd.gradcheck(
        lambda p: torch.func.functional_call(module, {"position": p}, (fine, coarse)), position
    )


def test_memory_grows_with_attention_not_with_unfolded_channels() -> None:
    base = floats_kept(window=3, heads=4, channels=64)
    larger = floats_kept(window=7, heads=4, channels=64)
    # Attention in float32, nothing else: (49 - 9) places, 4 heads.
    assert (larger - base) / (40 * 4) == pytest.approx(1, rel=0.1)
    # Far below what unfolded values of all channels would take: 49 * 64 on each coarse pixel.
    assert larger < 49 * 4 + 8 * 64


@pytest.mark.parametrize(
    ("channels", "keys", "window", "counts"),
    [
        (128, 64, 3, (49_824, 344_992, 82_848, 197_536, 1_037_427)),
        (128, 64, 5, (50_336, 345_504, 83_360, 198_048, 1_038_963)),
        (128, 64, 7, (51_104, 346_272, 84_128, 198_816, 1_041_267)),
        (256, 128, 3, (197_664, 1_377_824, 329_248, 788_000, 4_138_355)),
        (256, 128, 5, (198_176, 1_378_336, 329_760, 788_512, 4_139_891)),
    ],
)
def test_parts_have_the_counts_of_the_architecture(
    channels: int, keys: int, window: int, counts: tuple[int, ...]
) -> None:
    extract = RelationalSemanticsExtractor(channels, keys, window, 8)
    propagate = partial(RelationalSemanticsPropagator, extract, channels)
    head = RSPHead((8, 8, 8, 8), 19, channels, keys, window)
    pyramid_and_top = n_parameters(head.pyramid) + n_parameters(head.top)
    assert n_parameters(head.top) == 9 * channels**2 + 2 * channels
    found = (
        n_parameters(extract),
        n_parameters(propagate()),
        n_parameters(propagate(kernel_size=1)),
        n_parameters(propagate("sum")),
        n_parameters(head) - pyramid_and_top,
    )
    assert found == counts


def features(batch: int = 2) -> list[Tensor]:
    sizes = ((17, 23), (9, 12), (5, 6), (3, 3))  # odd, so no level is a multiple of another
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, *s, generator=generator) for c, s in zip(CHANNELS, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relation": "uniform"},
        {"relation": "bilinear"},
        {"use_position": False},
        {"window": 1},
        {"window": 5},
        {"fusion": "sum"},
        {"kernel_size": 1},
        {"pyramid": partial(BiFPN, levels=(2, 5), repeats=1)},
        {"pyramid": partial(BiFPN, levels=(3, 7), repeats=1)},
    ],
    ids=str,
)
def test_every_parameter_of_each_form_is_trained(options: dict[str, Any]) -> None:
    head = RSPHead(CHANNELS, 5, channels=16, key_channels=8, **options)
    logits = head(features())
    assert logits.shape == (2, 5, *((9, 12) if "levels=(3, 7)" in str(options) else (17, 23)))
    logits.square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_coarsest_level_reaches_beyond_its_own_cell() -> None:
    head = RSPHead(CHANNELS, 5, channels=16, key_channels=8).eval()
    inputs = [torch.randn(1, c, 128 >> i, 128 >> i) for i, c in enumerate(CHANNELS)]
    levels = [x.detach().requires_grad_() for x in head.pyramid(inputs)]
    context = head.top(levels[-1])
    for fine, propagate in zip(levels[-2::-1], reversed(head.propagators), strict=True):
        context = propagate(fine, context)
    logits = head.classify(context)
    torch.testing.assert_close(logits, head(inputs))
    logits[0, :, 64, 64].sum().backward()
    rows = (levels[-1].grad.abs().sum((0, 1, 3)) > 0).nonzero()
    assert rows.max() - rows.min() + 1 >= 5  # of 16, where upsampling alone would reach 3


@pytest.mark.parametrize("encoder", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize("size", [(97, 161), (64, 64)])
def test_logits_have_the_size_of_the_image(encoder: str, size: tuple[int, int]) -> None:
    # ConvNeXt halves odd sizes by rounding down.
    head = partial(RSPHead, channels=16, key_channels=8)
    network = Segmenter(TimmEncoder(encoder), head, num_classes=5).eval()
    with torch.no_grad():
        logits = network(torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8))
    assert logits.shape == (1, 5, *size)
    assert logits.isfinite().all()


def test_dilated_encoder_is_refused_with_the_cure() -> None:
    head = partial(RSPHead, channels=16, key_channels=8)
    network = Segmenter(TimmEncoder("resnet18", output_stride=16), head, num_classes=5)
    with pytest.raises(ValueError, match="use an encoder with output_stride 32"):
        network(torch.zeros(2, 3, 64, 64))


def test_each_propagator_is_one_fusion_of_two_branches() -> None:
    head = partial(RSPHead, channels=16, key_channels=8)
    network = Segmenter(TimmEncoder("test_resnet"), head, num_classes=5)
    found = find_fusions(network, torch.zeros(2, 3, 64, 64))
    assert {f.name: [(b.start, b.stop) for b in f.branches] for f in found} == {
        f"decode_head.propagators.{i}.fuse.conv": [(0, 16), (16, 32)] for i in range(3)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4}, "odd side, got 4"),
        ({"attention_heads": 3}, "attention_heads=3 must divide channels=16"),
        ({"relation": "nearest"}, "relation is .* got 'nearest'"),
        ({"fusion": "mean"}, "fusion is 'concat' or 'sum', got 'mean'"),
    ],
)
def test_impossible_heads_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RSPHead(CHANNELS, 5, **({"channels": 16, "key_channels": 8} | options))
