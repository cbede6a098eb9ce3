"""DeepLabV3+'s head: separable ASPP refined by a fine level (MMSegmentation `sep_aspp_head.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from seglab.models.heads.aspp import ASPPHead
from seglab.models.heads.blocks import ConvBlock, DepthwiseSeparable


class SepASPPHead(ASPPHead):
    """Depthwise-separable ASPP and a fine level (Chen et al. 2018); logits at that level's size.

    Two fusion points: `bottleneck` as in `ASPPHead`, and `sep_bottleneck.0.depthwise_conv`. The
    second is depthwise and followed by batch normalization, so the scale of its branches cancels in
    the forward pass: equalizing it changes nothing but the effective step size of those weights.

    Args:
        in_channels: channels of every encoder level, fine to coarse.
        num_classes: K, the number of logits.
        channels: width of every branch and of the fused maps.
        dropout: probability that a whole channel is zeroed before `conv_seg`.
        dilations: of the branches; 1 means a 1x1 convolution, others a dilated separable 3x3.
        in_index: the level under the ASPP; negative counts from the coarsest.
        fine_index: the level that refines.
        fine_channels: width to which the fine level is reduced.

    >>> import torch
    >>> head = SepASPPHead([16, 32], num_classes=5, channels=8)
    >>> head([torch.zeros(2, 16, 8, 8), torch.zeros(2, 32, 4, 4)]).shape
    torch.Size([2, 5, 8, 8])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        dilations: Sequence[int] = (1, 12, 24, 36),
        in_index: int = -1,
        fine_index: int = 0,
        fine_channels: int = 48,
    ) -> None:
        super().__init__(in_channels, num_classes, channels, dropout, dilations, in_index)
        self.fine_index = fine_index
        self.c1_bottleneck = ConvBlock(self.in_channels[fine_index], fine_channels)
        self.sep_bottleneck = nn.ModuleList(
            (
                DepthwiseSeparable([channels, fine_channels], channels),
                DepthwiseSeparable([channels], channels),
            )
        )

    def _make_branch(self, in_channels: int, dilation: int) -> nn.Module:
        if dilation == 1:
            return ConvBlock(in_channels, self.channels)
        return DepthwiseSeparable([in_channels], self.channels, dilation)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features (B, C_i, h_i, w_i) to logits (B, K, h, w), the size of `fine_index`."""
        context = self.fuse_context(features[self.in_index])
        fine = self.c1_bottleneck(features[self.fine_index])
        height, width = fine.shape[-2:]
        fused = self.sep_bottleneck[0]([context, fine], (height, width))
        return self.classify(self.sep_bottleneck[1](fused))
