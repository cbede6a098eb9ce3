"""Swin and Twins at sizes their windows do not divide, against brute-force attention."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from seglab.models import TimmEncoder
from seglab.models.families import (
    MaskedWindowAttention,
    PadThenShiftBlock,
    follow_mmsegmentation_,
)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def random_(module: nn.Module) -> nn.Module:
    """Let every parameter matter."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


@pytest.mark.parametrize("size", [(10, 17), (7, 14), (3, 5), (14, 8)])
def test_swin_pads_before_it_shifts(size: tuple[int, int]) -> None:
    encoder = TimmEncoder("swin_tiny_patch4_window7_224")
    block = random_(encoder.model.layers[0].blocks[1])
    assert isinstance(block, PadThenShiftBlock)
    assert block.shift_size == (3, 3)
    x = torch.randn(2, *size, 96)
    # On a map of whole windows there is nothing to pad, so no order to get wrong.
    rows, columns = -(-size[0] // 7) * 7, -(-size[1] // 7) * 7
    whole = torch.zeros(2, rows, columns, 96)
    whole[:, : size[0], : size[1]] = x
    expected = block._attn(whole)[:, : size[0], : size[1]]
    torch.testing.assert_close(block._attn(x), expected)


def test_swin_shifts_windows_in_its_smallest_stage() -> None:
    encoder = TimmEncoder("swin_tiny_patch4_window7_224")
    assert [block.shift_size for block in encoder.model.layers[3].blocks] == [(0, 0), (3, 3)]


def attend_by_hand(attention: nn.Module, x: Tensor, masked: bool) -> Tensor:
    """Each pixel attends to those of its 7 x 7 window, and to padding (zeros) if not masked."""
    batch, height, width, channels = x.shape
    side, heads = 7, attention.num_heads
    result = torch.zeros_like(x)
    for b, i, j in torch.cartesian_prod(*map(torch.arange, (batch, height, width))).tolist():
        top, left = i // side * side, j // side * side
        window = torch.zeros(side, side, channels)
        inside = x[b, top : top + side, left : left + side]
        window[: inside.shape[0], : inside.shape[1]] = inside
        keys = inside.reshape(-1, channels) if masked else window.reshape(-1, channels)
        query, _, _ = attention.qkv(x[b, i, j]).view(3, heads, -1)
        _, key, value = attention.qkv(keys).view(len(keys), 3, heads, -1).unbind(1)
        scores = torch.einsum("hd,khd->hk", query, key) * (channels // heads) ** -0.5
        result[b, i, j] = torch.einsum("hk,khd->hd", scores.softmax(-1), value).flatten()
    return attention.proj(result)


@pytest.mark.parametrize(
    ("size", "masked"), [((9, 10), True), ((7, 14), True), ((7, 9), False), ((3, 2), True)]
)
@torch.no_grad()
def test_twins_windows_do_not_attend_to_padding(size: tuple[int, int], masked: bool) -> None:
    attention = random_(TimmEncoder("twins_svt_small").model.blocks[0][0].attn)
    assert isinstance(attention, MaskedWindowAttention)
    x = torch.randn(2, *size, 64)
    found = attention(x.flatten(1, 2), size).view(x.shape)
    # With one side padded MMSegmentation's mask is empty; ours follows.
    torch.testing.assert_close(found, attend_by_hand(attention, x, masked), atol=1e-4, rtol=1e-4)


def test_twins_keeps_odd_rows_and_columns() -> None:
    encoder = TimmEncoder("twins_svt_small").eval()
    sizes = [tuple(x.shape[2:]) for x in encoder(torch.zeros(1, 3, 68, 100))]
    assert sizes == [(17, 25), (9, 13), (5, 7), (3, 4)]


@torch.no_grad()
def test_twins_continues_from_normed_maps() -> None:
    encoder = TimmEncoder("twins_svt_small").eval()
    image = torch.randn(1, 3, 64, 64)
    before = encoder(image)[1]
    encoder.norm0.weight.mul_(torch.rand(64))
    assert not torch.allclose(encoder(image)[1], before)


def test_twins_drops_paths_as_often_as_mmsegmentation() -> None:
    blocks = TimmEncoder("twins_svt_small", drop_path=0.2).model.blocks
    single = torch.linspace(0, 0.2, 18).tolist()
    twice = [1 - (1 - rate) ** 2 for rate in single]
    flat = [block for stage in blocks for block in stage]
    for i, block in enumerate(flat[1:], start=1):
        is_local = isinstance(block.attn, MaskedWindowAttention)
        rate = single[i] if is_local else twice[i]
        assert block.drop_path1.drop_prob == pytest.approx(rate), i
        assert block.drop_path2.drop_prob == pytest.approx(twice[i]), i


def test_other_families_are_left_alone() -> None:
    model = timm.create_model("convnext_atto")
    types = [type(module) for module in model.modules()]
    follow_mmsegmentation_(model)
    assert [type(module) for module in model.modules()] == types
