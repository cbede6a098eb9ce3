"""UPerNet's head: pyramid pooling atop a feature pyramid (MMSegmentation `uper_head.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from seglab.models.heads.base import Head
from seglab.models.heads.blocks import ConvBlock, PyramidPool
from seglab.operators.fusion_conv import FusionBlock, resize


class UPerHead(Head):
    """Unified perceptual parsing head (Xiao et al. 2018), logits at the finest level's size.

    Two fusion points: `bottleneck` (the coarsest level with its pooled views) and `fpn_bottleneck`
    (all levels). The top-down path adds and is not a fusion in the sense of scale equalization.

    Args:
        in_channels: channels of every encoder level, fine to coarse.
        num_classes: K, the number of logits.
        channels: width of every convolution of the head.
        dropout: probability that a whole channel is zeroed before `conv_seg`.
        pool_scales: grid sizes of the pyramid pooling.

    >>> import torch
    >>> head = UPerHead([16, 32], num_classes=5, channels=8)
    >>> head([torch.zeros(2, 16, 8, 8), torch.zeros(2, 32, 4, 4)]).shape
    torch.Size([2, 5, 8, 8])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__(in_channels, num_classes, channels, dropout)
        *finer, coarsest = self.in_channels
        self.psp_modules = PyramidPool(coarsest, channels, pool_scales)
        self.bottleneck = FusionBlock([coarsest] + [channels] * len(pool_scales), channels)
        self.lateral_convs = nn.ModuleList(ConvBlock(width, channels) for width in finer)
        self.fpn_convs = nn.ModuleList(ConvBlock(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = FusionBlock([channels] * len(self.in_channels), channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features (B, C_i, h_i, w_i), fine to coarse, to logits (B, K, h_0, w_0)."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=False)]
        laterals.append(self._pool_context(features[-1]))
        for level in range(len(laterals) - 1, 0, -1):
            height, width = laterals[level - 1].shape[-2:]
            laterals[level - 1] = laterals[level - 1] + resize(laterals[level], (height, width))
        # The coarsest level has had its 3x3 convolution in `bottleneck`.
        smoothed = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        return self.classify(self.fpn_bottleneck([*smoothed, laterals[-1]]))

    def _pool_context(self, x: Tensor) -> Tensor:
        context: Tensor = self.bottleneck([x, *self.psp_modules(x)])
        return context
