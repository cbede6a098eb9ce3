"""DeepLabV3's head: one level seen at several dilations (MMSegmentation `aspp_head.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from seglab.models.heads.base import Head
from seglab.models.heads.blocks import ConvBlock, PooledBlock
from seglab.operators.fusion_conv import FusionBlock


class ASPPHead(Head):
    """Atrous spatial pyramid pooling (Chen et al. 2017); logits at the level's size.

    One fusion point, `bottleneck`: image pooling (upsampled from 1 x 1, so constant per image),
    then one branch per dilation.

    Args:
        in_channels: channels of every encoder level, fine to coarse.
        num_classes: K, the number of logits.
        channels: width of every branch and of the fused map.
        dropout: probability that a whole channel is zeroed before `conv_seg`.
        dilations: of the branches; 1 means a 1x1 convolution, others a dilated 3x3.
        in_index: which level is read; negative counts from the coarsest.

    >>> import torch
    >>> head = ASPPHead([16, 32], num_classes=5, channels=8)
    >>> head([torch.zeros(2, 16, 8, 8), torch.zeros(2, 32, 4, 4)]).shape
    torch.Size([2, 5, 4, 4])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        dilations: Sequence[int] = (1, 12, 24, 36),
        in_index: int = -1,
    ) -> None:
        super().__init__(in_channels, num_classes, channels, dropout)
        self.in_index = in_index
        width = self.in_channels[in_index]
        self.image_pool = PooledBlock(width, channels, bins=1)
        self.aspp_modules = nn.ModuleList(
            self._make_branch(width, dilation) for dilation in dilations
        )
        self.bottleneck = FusionBlock([channels] * (1 + len(dilations)), channels)

    def _make_branch(self, in_channels: int, dilation: int) -> nn.Module:
        kernel_size = 1 if dilation == 1 else 3
        return ConvBlock(in_channels, self.channels, kernel_size, dilation)

    def fuse_context(self, x: Tensor) -> Tensor:
        """Map one level (B, C, h, w) to its fused branches (B, channels, h, w)."""
        height, width = x.shape[-2:]
        branches = [self.image_pool(x), *(branch(x) for branch in self.aspp_modules)]
        fused: Tensor = self.bottleneck(branches, (height, width))
        return fused

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features (B, C_i, h_i, w_i) to logits (B, K, h, w), the size of level `in_index`."""
        return self.classify(self.fuse_context(features[self.in_index]))
