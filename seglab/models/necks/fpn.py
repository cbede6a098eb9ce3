"""Feature pyramid network (Lin et al. 2017): top-down sums of lateral 1x1 convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from seglab.models.necks.base import Neck
from seglab.operators.resampling import Resampling


class FPN(Neck):
    """Top-down pyramid without normalization or activation, as in torchvision and detectron2.

    Coarse maps are upsampled by nearest neighbour and added to the lateral of the next finer level;
    every sum is smoothed by a 3x3 convolution.

    Args:
        in_channels: channels of every encoder level, fine to coarse.
        channels: width of every map of the pyramid.

    >>> import torch
    >>> neck = FPN([16, 32], 8)
    >>> [tuple(x.shape) for x in neck([torch.zeros(2, 16, 9, 9), torch.zeros(2, 32, 5, 5)])]
    [(2, 8, 9, 9), (2, 8, 5, 5)]
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.channels = (channels,) * len(in_channels)
        self.lateral_convs = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.fpn_convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels
        )
        self.upsample = Resampling("nearest")
        for conv in [*self.lateral_convs, *self.fpn_convs]:
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map features (B, C_i, h_i, w_i), fine to coarse, to (B, channels, h_i, w_i)."""
        sums = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=True)]
        for level in range(len(sums) - 1, 0, -1):
            height, width = sums[level - 1].shape[-2:]
            sums[level - 1] = sums[level - 1] + self.upsample(sums[level], (height, width))
        return [conv(x) for conv, x in zip(self.fpn_convs, sums, strict=True)]
