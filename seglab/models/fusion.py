"""The one place where branches of different size become one map: resize, concatenate, convolve.

Every head goes through `FusionConv2d`, an `nn.Conv2d` that takes the *list* of branches. Its weight
and its state-dict key are those of the ordinary convolution over the concatenation, so checkpoints
load by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, h, w) bilinearly to `size`, half-pixel centres; equal sizes pass untouched.

    >>> resize(torch.zeros(1, 3, 4, 4), (8, 6)).shape
    torch.Size([1, 3, 8, 6])
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class FusionConv2d(nn.Conv2d):
    """A convolution over the channel concatenation of several branches.

    The input channels of the weight are the branches' channels in the order of the list.

    >>> conv = FusionConv2d(8 + 4, 16, 3, padding=1)
    >>> fine, coarse = torch.zeros(2, 8, 32, 32), torch.zeros(2, 4, 16, 16)
    >>> conv([fine, coarse]).shape
    torch.Size([2, 16, 32, 32])
    """

    def forward(  # type: ignore[override]  # the point of the class: a list instead of one map
        self, features: Sequence[Tensor], size: tuple[int, int] | None = None
    ) -> Tensor:
        """Bring each branch to `size` (default: the first branch's), concatenate, convolve.

        Args:
            features: branches, each (B, C_i, h_i, w_i) with sum of C_i = `in_channels`.
            size: height and width of the result before the convolution's own stride.

        Raises:
            ValueError: the branches' channels do not add up to `in_channels`.
        """
        if sum(feature.shape[1] for feature in features) != self.in_channels:
            raise ValueError(
                f"fusion expects {self.in_channels} channels, got branches of "
                f"{[feature.shape[1] for feature in features]}: give one for each it was built for"
            )
        height, width = size or features[0].shape[-2:]
        resized = [resize(feature, (height, width)) for feature in features]
        return super().forward(torch.cat(resized, dim=1))


class FusionBlock(nn.Module):
    """`FusionConv2d`, batch normalization, ReLU: MMSegmentation's ConvModule over a concatenation.

    Sub-modules are `conv` and `bn` as there. Initialization: Kaiming normal with mode fan_out, so
    that it does not depend on how many channels are concatenated (mmengine,
    `model/weight_init.py`).

    >>> block = FusionBlock([8, 4], 16, kernel_size=3)
    >>> block([torch.zeros(2, 8, 32, 32), torch.zeros(2, 4, 16, 16)]).shape
    torch.Size([2, 16, 32, 32])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        kernel_size: int = 3,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = FusionConv2d(
            sum(in_channels),
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.activate = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Fuse branches (B, C_i, h_i, w_i) into (B, out_channels, *size)."""
        fused: Tensor = self.activate(self.bn(self.conv(features, size)))
        return fused
