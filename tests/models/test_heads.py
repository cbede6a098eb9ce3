"""What the heads compute: resolution, fusion points, pooling in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seglab.models.heads import ASPPHead, FCNHead, Head, PSPHead, SepASPPHead, UPerHead
from seglab.operators.fusion_conv import FusionConv2d

CHANNELS = (8, 12, 16, 20)
SIZES = ((17, 23), (9, 12), (5, 6), (3, 3))  # odd, so no level is a multiple of another


@pytest.fixture
def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, width, *size, generator=generator)
        for width, size in zip(CHANNELS, SIZES, strict=True)
    ]


@pytest.mark.parametrize(
    ("factory", "size"),
    [
        (UPerHead, SIZES[0]),
        (PSPHead, SIZES[3]),
        (ASPPHead, SIZES[3]),
        (SepASPPHead, SIZES[0]),
        (FCNHead, SIZES[3]),
    ],
)
def test_logits_have_the_size_of_the_level_the_head_ends_at(
    factory: type[Head], size: tuple[int, int], features: list[Tensor]
) -> None:
    head = factory(CHANNELS, 5, channels=8)
    logits = head(features)
    assert logits.shape == (2, 5, *size)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


class Concatenations(TorchFunctionMode):
    """Counts the concatenations and what else fusion consists of."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.cat:
            self.seen.append(tuple(branch.shape[1] for branch in args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("factory", "branches"),
    [
        (UPerHead, [(20, 8, 8, 8, 8), (8, 8, 8, 8)]),
        (PSPHead, [(20, 8, 8, 8, 8)]),
        (ASPPHead, [(8, 8, 8, 8, 8)]),
        (SepASPPHead, [(8, 8, 8, 8, 8), (8, 48)]),
        (FCNHead, [(20, 8)]),
    ],
)
def test_head_fuses_by_visible_concatenations(
    factory: type[Head], branches: list[tuple[int, ...]], features: list[Tensor]
) -> None:
    with Concatenations() as watch:
        factory(CHANNELS, 5, channels=8)(features)
    assert watch.seen == branches


def test_auxiliary_head_has_no_fusion(features: list[Tensor]) -> None:
    head = FCNHead(CHANNELS, 5, channels=8, in_index=2, num_convs=1, concat_input=False)
    with Concatenations() as watch:
        assert head(features).shape == (2, 5, *SIZES[2])
    assert watch.seen == []


def test_fusion_equals_a_convolution_over_the_concatenation(features: list[Tensor]) -> None:
    conv = FusionConv2d(sum(CHANNELS), 7, 3, padding=1)
    upsampled = [F.interpolate(x, SIZES[0], mode="bilinear", align_corners=False) for x in features]
    expected = F.conv2d(torch.cat(upsampled, 1), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(features), expected)


def test_fusion_refuses_branches_it_was_not_built_for(features: list[Tensor]) -> None:
    with pytest.raises(ValueError, match=r"expects 56 channels.*\[8, 12, 16\]"):
        FusionConv2d(sum(CHANNELS), 7, 3)(features[:3])


def test_global_pooling_of_a_single_image_names_the_cure(features: list[Tensor]) -> None:
    single = [x[:1] for x in features]
    head = PSPHead(CHANNELS, 5, channels=8)
    with pytest.raises(ValueError, match="batch size of at least 2 per device"):
        head(single)
    assert head.eval()(single).shape == (1, 5, 3, 3)


def test_frozen_normalization_trains_on_a_single_image(features: list[Tensor]) -> None:
    head = ASPPHead(CHANNELS, 5, channels=8)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert head([x[:1] for x in features]).shape == (1, 5, 3, 3)


def test_head_is_deterministic_in_evaluation(features: list[Tensor]) -> None:
    head = UPerHead(CHANNELS, 5, channels=8, dropout=0.5)
    assert not torch.equal(head(features), head(features))
    head.eval()
    assert torch.equal(head(features), head(features))


def test_fcn_head_without_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="num_convs >= 1, got 0"):
        FCNHead(CHANNELS, 5, num_convs=0)
