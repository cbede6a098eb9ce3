"""FCN head: a few convolutions on one level (MMSegmentation `fcn_head.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from seglab.models.heads.base import Head
from seglab.models.heads.blocks import ConvBlock
from seglab.operators.fusion_conv import FusionBlock


class FCNHead(Head):
    """Convolutions on one encoder level, optionally fused with that level itself.

    As auxiliary head the recipes use `in_index=2, channels=256, num_convs=1, concat_input=False`.
    With `concat_input` there is one fusion point, `conv_cat`: no upsampling, but a raw encoder map
    beside a normalized one.

    Args:
        in_channels: channels of every encoder level, fine to coarse.
        num_classes: K, the number of logits.
        channels: width of the convolutions.
        dropout: probability that a whole channel is zeroed before `conv_seg`.
        in_index: which level is read; negative counts from the coarsest.
        num_convs: number of 3x3 blocks, at least 1.
        concat_input: fuse the level itself with the convolved map.

    >>> import torch
    >>> head = FCNHead([16, 32], num_classes=5, channels=8, in_index=-1)
    >>> head([torch.zeros(1, 16, 8, 8), torch.zeros(1, 32, 4, 4)]).shape
    torch.Size([1, 5, 4, 4])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        in_index: int = -1,
        num_convs: int = 2,
        concat_input: bool = True,
    ) -> None:
        super().__init__(in_channels, num_classes, channels, dropout)
        if num_convs < 1:
            raise ValueError(f"FCNHead needs num_convs >= 1, got {num_convs}")
        width = self.in_channels[in_index]
        self.in_index = in_index
        widths = [width] + [channels] * num_convs
        self.convs = nn.Sequential(
            *(ConvBlock(fan_in, channels, kernel_size=3) for fan_in in widths[:-1])
        )
        self.conv_cat = FusionBlock([width, channels], channels) if concat_input else None

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features (B, C_i, h_i, w_i) to logits (B, K, h, w), the size of level `in_index`."""
        x = features[self.in_index]
        convolved = self.convs(x)
        if self.conv_cat is not None:
            convolved = self.conv_cat([x, convolved])
        return self.classify(convolved)
