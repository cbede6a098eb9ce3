"""Logits of every head against its drawing, written out with torch's own functions.

Weights come from the head's state dict by name, in MMSegmentation's order of things
(`uper_head.py`, `psp_head.py`, `aspp_head.py`, `sep_aspp_head.py`, `fcn_head.py`); no module of
ours computes anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seglab.models.heads import ASPPHead, FCNHead, Head, PSPHead, SepASPPHead, UPerHead

CHANNELS = (6, 8, 10, 12)
SIZES = ((17, 23), (9, 12), (5, 6), (3, 4))  # odd, so no level is a multiple of another
POOLS, DILATIONS = (1, 2, 3, 6), (1, 12, 24, 36)


class Drawing:
    """A head's weights, and the few operations heads are drawn of."""

    def __init__(self, head: Head) -> None:
        self.weights = {name: value.clone() for name, value in head.state_dict().items()}
        self.training = head.training

    def block(self, name: str, x: Tensor, dilation: int = 1, groups: int = 1) -> Tensor:
        """Convolution that keeps the size, batch normalization, ReLU."""
        kernel = self.weights[f"{name}.conv.weight"]
        padding = dilation * (kernel.shape[-1] // 2)
        x = F.conv2d(x, kernel, padding=padding, dilation=dilation, groups=groups)
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        else:
            mean, variance = (self.weights[f"{name}.bn.running_{key}"] for key in ("mean", "var"))
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        gain, bias = (self.weights[f"{name}.bn.{key}"] for key in ("weight", "bias"))
        return (x * gain[:, None, None] + bias[:, None, None]).clamp_min(0)

    def separable(self, name: str, x: Tensor, dilation: int = 1) -> Tensor:
        x = self.block(f"{name}.depthwise_conv", x, dilation, groups=x.shape[1])
        return self.block(f"{name}.pointwise_conv", x)

    def pooled(self, x: Tensor) -> list[Tensor]:
        """The map itself, then its means over 1, 2, 3 and 6 cells each way."""
        views = [
            self.block(f"psp_modules.{i}.1", F.adaptive_avg_pool2d(x, bins))
            for i, bins in enumerate(POOLS)
        ]
        return [x, *(up(view, x) for view in views)]

    def classify(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weights["conv_seg.weight"], self.weights["conv_seg.bias"])


def up(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def draw_uper(head: Drawing, features: Sequence[Tensor]) -> Tensor:
    c1, c2, c3, c4 = features
    top = head.block("bottleneck", torch.cat(head.pooled(c4), 1))
    # From the top down: each level adds the sum above it, not the bare level.
    third = head.block("lateral_convs.2", c3) + up(top, c3)
    second = head.block("lateral_convs.1", c2) + up(third, c2)
    first = head.block("lateral_convs.0", c1) + up(second, c1)
    outputs = [head.block(f"fpn_convs.{i}", x) for i, x in enumerate((first, second, third))]
    return head.block("fpn_bottleneck", torch.cat([up(x, c1) for x in (*outputs, top)], 1))


def draw_psp(head: Drawing, features: Sequence[Tensor]) -> Tensor:
    return head.block("bottleneck", torch.cat(head.pooled(features[-1]), 1))


def draw_context(head: Drawing, x: Tensor, separable: bool) -> Tensor:
    branches = [up(head.block("image_pool.1", x.mean((2, 3), keepdim=True)), x)]
    branches.append(head.block("aspp_modules.0", x))
    for i in (1, 2, 3):
        branch = head.separable if separable else head.block
        branches.append(branch(f"aspp_modules.{i}", x, DILATIONS[i]))
    return head.block("bottleneck", torch.cat(branches, 1))


def draw_aspp(head: Drawing, features: Sequence[Tensor]) -> Tensor:
    return draw_context(head, features[-1], separable=False)


def draw_sep_aspp(head: Drawing, features: Sequence[Tensor]) -> Tensor:
    context = draw_context(head, features[-1], separable=True)
    fine = head.block("c1_bottleneck", features[0])
    fused = torch.cat([up(context, fine), fine], 1)
    return head.separable("sep_bottleneck.1", head.separable("sep_bottleneck.0", fused))


def draw_fcn(head: Drawing, features: Sequence[Tensor]) -> Tensor:
    x = features[-1]
    convolved = head.block("convs.1", head.block("convs.0", x))
    return head.block("conv_cat", torch.cat([x, convolved], 1))


def draw_auxiliary(head: Drawing, features: Sequence[Tensor]) -> Tensor:
    return head.block("convs.0", features[2])


AUXILIARY = partial(FCNHead, in_index=2, num_convs=1, concat_input=False)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("factory", "draw"),
    [
        (UPerHead, draw_uper),
        (PSPHead, draw_psp),
        (ASPPHead, draw_aspp),
        (SepASPPHead, draw_sep_aspp),
        (FCNHead, draw_fcn),
        (AUXILIARY, draw_auxiliary),
    ],
    ids=["uper", "psp", "aspp", "sep_aspp", "fcn", "auxiliary"],
)
@torch.no_grad()
def test_logits_are_those_of_the_drawing(
    factory: Callable[..., Head],
    draw: Callable[[Drawing, Sequence[Tensor]], Tensor],
    training: bool,
) -> None:
    torch.manual_seed(0)
    features = [
        torch.randn(2, width, *size, dtype=torch.float64)
        for width, size in zip(CHANNELS, SIZES, strict=True)
    ]
    head = factory(CHANNELS, 5, channels=8, dropout=0.0).double().train(training)
    for value in head.state_dict().values():
        if value.is_floating_point():
            value.copy_(
                torch.rand_like(value) + 0.5 if value.ndim == 1 else torch.randn_like(value)
            )
    drawing = Drawing(head)
    expected = drawing.classify(draw(drawing, features))
    error = (head(features) - expected).abs().max() / expected.abs().max()
    assert error < 1e-12
