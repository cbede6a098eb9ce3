"""Building blocks of EfficientDet's kind: separable convolution, projection, max-pooling to a size.

Batch normalization has TensorFlow's constants, convolutions start Glorot uniform (google/automl).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from seglab.models.normalization import refuse_single_value


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization with EfficientDet's constants; says why it cannot train on one value."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, H, W)."""
        if self.training:
            n_values = x.shape[0] * x.shape[2] * x.shape[3]
            refuse_single_value(self, n_values, "a pyramid level of 1 x 1 pixels")
        return super().forward(x)


def glorot_(conv: nn.Conv2d) -> nn.Conv2d:
    """Initialize a convolution as TensorFlow does: Glorot uniform, bias 0."""
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class SeparableConv(nn.Sequential):
    """Depthwise 3x3, pointwise 1x1, batch normalization.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        bias: whether the pointwise convolution has a bias, redundant as normalization follows;
            EfficientDet has it.

    >>> import torch
    >>> SeparableConv(8, 16)(torch.zeros(2, 8, 5, 5)).shape
    torch.Size([2, 16, 5, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        depthwise = nn.Conv2d(in_channels, in_channels, 3, 1, 1, groups=in_channels, bias=False)
        pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        super().__init__(glorot_(depthwise), glorot_(pointwise), BatchNorm(out_channels))


class Projection(nn.Sequential):
    """1x1 convolution and batch normalization where the number of channels differs, else nothing.

    >>> import torch
    >>> len(Projection(8, 8)), Projection(8, 16)(torch.zeros(2, 8, 5, 5)).shape
    (0, torch.Size([2, 16, 5, 5]))
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        if in_channels != out_channels:
            self.append(glorot_(nn.Conv2d(in_channels, out_channels, 1, bias=bias)))
            self.append(BatchNorm(out_channels))


def pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Max-pool (B, C, h, w) to `size`, window stride + 1, padded as TensorFlow's SAME.

    The stride of an axis is the ratio of its sizes; an axis that is not larger is left alone. Sizes
    that halve by rounding up are met exactly; others (an encoder that rounds down) within a pixel.

    >>> import torch
    >>> pool_to(torch.arange(5.0).view(1, 1, 1, 5), (1, 3))
    tensor([[[[1., 3., 4.]]]])
    """
    (height, width), (rows, columns) = x.shape[-2:], size
    down, across = _stride(height, rows), _stride(width, columns)
    if down == across == 1:
        return x
    padding = (*_same_padding(width, across), *_same_padding(height, down))
    padded = F.pad(x, padding, value=float("-inf"))
    return F.max_pool2d(padded, (_window(down), _window(across)), (down, across))


def _stride(have: int, want: int) -> int:
    for stride in (1, 2):  # what is usual first: a symbolic size is then not divided
        if have == stride * want:
            return stride
    return max(1, (have + want // 2) // want)


def _window(stride: int) -> int:
    return stride + 1 if stride > 1 else 1


def _same_padding(length: int, stride: int) -> tuple[int, int]:
    n_out = -(-length // stride)
    total = (n_out - 1) * stride + _window(stride) - length
    return total // 2, total - total // 2
