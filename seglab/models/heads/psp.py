"""PSPNet's head: one level fused with pooled views of itself (MMSegmentation `psp_head.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seglab.models.heads.base import Head
from seglab.models.heads.blocks import PyramidPool
from seglab.operators.fusion_conv import FusionBlock


class PSPHead(Head):
    """Pyramid pooling (Zhao et al. 2017) on one encoder level; logits at that level's size.

    One fusion point, `bottleneck`: the raw encoder map beside its pooled, normalized views.

    Args:
        in_channels: channels of every encoder level, fine to coarse.
        num_classes: K, the number of logits.
        channels: width of the pooled views and of the fused map.
        dropout: probability that a whole channel is zeroed before `conv_seg`.
        pool_scales: grid sizes of the pooling.
        in_index: which level is read; negative counts from the coarsest.

    >>> import torch
    >>> head = PSPHead([16, 32], num_classes=5, channels=8)
    >>> head([torch.zeros(2, 16, 8, 8), torch.zeros(2, 32, 4, 4)]).shape
    torch.Size([2, 5, 4, 4])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        in_index: int = -1,
    ) -> None:
        super().__init__(in_channels, num_classes, channels, dropout)
        self.in_index = in_index
        width = self.in_channels[in_index]
        self.psp_modules = PyramidPool(width, channels, pool_scales)
        self.bottleneck = FusionBlock([width] + [channels] * len(pool_scales), channels)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features (B, C_i, h_i, w_i) to logits (B, K, h, w), the size of level `in_index`."""
        x = features[self.in_index]
        return self.classify(self.bottleneck([x, *self.psp_modules(x)]))
