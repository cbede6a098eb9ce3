"""Both decoders on sizes, precisions and layouts that people really have, against float64."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seglab
from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import BiFPNHead, RSPHead
from seglab.models.necks import BiFPN
from seglab.operators.acceleration import CannotAccelerateError

CHANNELS = (4, 6, 8, 10)
HEADS: dict[str, Any] = {
    "eseg": partial(BiFPNHead, channels=8, repeats=2, levels=(2, 9), head_repeats=1, dropout=0.0),
    "rsp": partial(RSPHead, channels=16, key_channels=8, attention_heads=4, dropout=0.0),
    "rsp-bifpn": partial(
        RSPHead, channels=16, key_channels=8, dropout=0.0, pyramid=partial(BiFPN, levels=(2, 6))
    ),
}
SIZES = [(64, 96), (97, 65), (33, 250), (512, 32)]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return HEADS[name](CHANNELS, 5)


def features(height: int, width: int, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, -(-height // 2**i), -(-width // 2**i), generator=generator)
        for i, c in zip((2, 3, 4, 5), CHANNELS, strict=True)
    ]


def expected(head: nn.Module, maps: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(head).double()([x.double() for x in maps])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("training", [False, True])
def test_channels_last_and_one_image_at_a_time(
    name: str, size: tuple[int, int], training: bool
) -> None:
    head, maps = build(name).train(training), features(*size, batch=2)
    wanted = expected(head, maps)
    assert wanted.shape == (2, 5, *maps[0].shape[-2:])
    twin = copy.deepcopy(head).to(memory_format=torch.channels_last)
    found = twin([x.to(memory_format=torch.channels_last) for x in maps])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-4)
    found.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in twin.parameters())
    if not training:
        single = torch.cat([head([x[i : i + 1] for x in maps]) for i in (0, 1)])
        torch.testing.assert_close(single.double(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_stays_close_and_trains(name: str, training: bool) -> None:
    head, maps = build(name).train(training), features(97, 65, batch=4)
    wanted = expected(head, maps)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(maps)
    error = (found.detach().double() - wanted).norm() / wanted.norm()
    assert error < 0.05
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_accelerating_changes_no_number(name: str) -> None:
    torch.manual_seed(0)
    network = Segmenter(TimmEncoder("test_resnet"), HEADS[name], num_classes=5)
    example = torch.rand(2, 3, 97, 129) * 255
    plain = copy.deepcopy(network)
    try:
        fast = seglab.accelerate(network, example)
    except CannotAccelerateError:  # these heads have nothing left to gain
        fast = network
    for mode in (True, False):
        ours, theirs = fast.train(mode)(example), plain.train(mode)(example)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        for each, logits in ((fast, ours), (plain, theirs)):
            each.zero_grad()
            logits.square().mean().backward()
        pairs = zip(fast.parameters(), plain.parameters(), strict=True)
        for found, wanted in pairs:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-2, atol=1e-3)
