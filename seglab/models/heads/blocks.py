"""Building blocks of the heads, with the sub-module names of mmcv's ConvModule family."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from seglab.models.normalization import refuse_single_value
from seglab.operators.fusion_conv import FusionBlock


class ConvBlock(nn.Module):
    """Convolution without bias, batch normalization, ReLU (mmcv `cnn/bricks/conv_module.py`).

    >>> import torch
    >>> ConvBlock(8, 16, kernel_size=3, dilation=2)(torch.zeros(2, 8, 10, 10)).shape
    torch.Size([2, 16, 10, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.activate = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, H, W)."""
        activated: Tensor = self.activate(self.bn(self.conv(x)))
        return activated


class DepthwiseSeparable(nn.Module):
    """Depthwise 3x3 block, then pointwise 1x1 block (mmcv `depthwise_separable_conv_module.py`).

    Built for several input widths, the depthwise convolution fuses that many branches.

    >>> import torch
    >>> DepthwiseSeparable([8], 16)(torch.zeros(2, 8, 10, 10)).shape
    torch.Size([2, 16, 10, 10])
    >>> fuse = DepthwiseSeparable([8, 4], 16)
    >>> fuse([torch.zeros(2, 8, 10, 10), torch.zeros(2, 4, 5, 5)], (10, 10)).shape
    torch.Size([2, 16, 10, 10])
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, dilation: int = 1) -> None:
        super().__init__()
        width = sum(in_channels)
        self.depthwise_conv: nn.Module
        if len(in_channels) > 1:
            self.depthwise_conv = FusionBlock(in_channels, width, groups=width)
        else:
            self.depthwise_conv = ConvBlock(width, width, 3, dilation=dilation, groups=width)
        self.pointwise_conv = ConvBlock(width, out_channels)

    def forward(self, x: Tensor | Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Map (B, C, H, W), or branches and the size to fuse at, to (B, out_channels, H, W)."""
        depthwise = self.depthwise_conv(x) if size is None else self.depthwise_conv(x, size)
        pointwise: Tensor = self.pointwise_conv(depthwise)
        return pointwise


class PooledBlock(nn.Sequential):
    """Average pooling to a `bins` x `bins` grid, then a 1x1 block (keys `1.conv`, `1.bn`).

    Raises:
        ValueError: in training with a single pooled value per channel, whose batch statistics do
            not exist.

    >>> import torch
    >>> PooledBlock(8, 16, bins=2)(torch.zeros(2, 8, 10, 10)).shape
    torch.Size([2, 16, 2, 2])
    """

    def __init__(self, in_channels: int, out_channels: int, bins: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(bins), ConvBlock(in_channels, out_channels))
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, bins, bins)."""
        norm: nn.Module = self[1].get_submodule("bn")
        refuse_single_value(norm, x.shape[0] * self.bins**2, "global pooling")
        pooled: Tensor = self[1](self[0](x))
        return pooled


class PyramidPool(nn.ModuleList):
    """Pooled views of one map at several grid sizes (PSPNet's pyramid pooling module).

    >>> import torch
    >>> [tuple(x.shape) for x in PyramidPool(8, 16, (1, 2))(torch.zeros(2, 8, 10, 10))]
    [(2, 16, 1, 1), (2, 16, 2, 2)]
    """

    def __init__(self, in_channels: int, channels: int, pool_scales: Sequence[int]) -> None:
        super().__init__(PooledBlock(in_channels, channels, bins) for bins in pool_scales)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map (B, C, H, W) to one (B, channels, s, s) for each scale s."""
        return [block(x) for block in self]
