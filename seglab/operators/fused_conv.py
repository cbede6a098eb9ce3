"""The operator under `FusionConv2d`: convolve resized branches without resizing them.

A convolution over concatenated, resized branches is linear, so each branch i may be multiplied by
the k x k taps of its weight slice at its *own* resolution, and the products resized, shifted and
added up afterwards, one axis at a time:

    y = sum_i sum_kx B_i,kx (sum_ky A_i,ky (W_i[ky, kx] x_i))

A and B are the matrices of `resampling.py`. The result is exact, zero-padded borders included. The
multiplications of a branch shrink by its ratio of areas, and neither a resized map nor the
concatenation exists, so nothing but the branches themselves is kept for the backward pass.

Layout: channels last throughout, so that every step is a matrix product with long contiguous rows.
The rows of the result are made a few at a time; what lies between is small enough for the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seglab.operators.resampling import Bands, ConvAxis, Resampling, banded_taps

BAND_BYTES = 2 << 20  # of the rows in the making; about what a core's second-level cache holds
PRODUCT_BYTES = 32 << 20  # of one product; glibc returns larger blocks to the system on every free


@dataclass(frozen=True)
class Geometry:
    """Everything about a fusion that is not a tensor.

    Attributes:
        size: height and width of the resized branches.
        rows: the convolution along the height.
        columns: the convolution along the width.
        resampling: how branches are resized.
    """

    size: tuple[int, int]
    rows: ConvAxis
    columns: ConvAxis
    resampling: Resampling

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return self.rows.n_out(self.size[0]), self.columns.n_out(self.size[1])

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve a map that has the fusion's size."""
        stride, padding, dilation = self._arguments
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @property
    def _arguments(self) -> tuple[tuple[int, int], ...]:
        rows, columns = self.rows, self.columns
        return (
            (rows.stride, columns.stride),
            (rows.padding, columns.padding),
            (rows.dilation, columns.dilation),
        )

    def convolve_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `convolve` with regard to map and weight, as far as needed."""
        mask = [*needs, False]
        gradients = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *self._arguments, False, [0, 0], 1, mask
        )
        return gradients[0], gradients[1]


def resize_and_convolve(
    features: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Do it the plain way: resize each branch (B, C_i, h_i, w_i), concatenate, convolve.

    Args:
        features: the branches.
        weights: slices (O, C_i, kh, kw) of the weight, one for each branch.
        bias: (O,) or None.
        geometry: size, convolution and resampling.
    """
    resized = [geometry.resampling(feature, geometry.size) for feature in features]
    if len(resized) == 1:
        return geometry.convolve(resized[0], weights[0], bias)
    return geometry.convolve(torch.cat(resized, dim=1), torch.cat(list(weights), dim=1), bias)


def plain_gradients(
    grad: Tensor, features: Sequence[Tensor], weights: Sequence[Tensor], geometry: Geometry
) -> list[Tensor | None]:
    """Gradients of `resize_and_convolve` with regard to the features, then the weights."""
    resized = torch.cat([geometry.resampling(x, geometry.size) for x in features], dim=1)
    whole = torch.cat(list(weights), dim=1)
    grad_map, grad_weight = geometry.convolve_backward(grad, resized, whole, (True, True))
    channels = [x.shape[1] for x in features]
    pairs = zip(torch.split(grad_map, channels, dim=1), features, strict=True)
    maps = [geometry.resampling.transpose(part, (x.shape[2], x.shape[3])) for part, x in pairs]
    return [*maps, *torch.split(grad_weight, channels, dim=1)]


def add_branch_(out: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """Add conv(up(x), weight) to `out` without making up(x).

    Args:
        out: (B, H, W, O), contiguous, float32 or float64; changed in place.
        x: branch (B, C, h, w).
        weight: its slice (O, C, kh, kw).
        geometry: size, convolution and resampling.
    """
    rows, columns = _matrices(out, x, geometry)
    taps = _row_taps(weight)
    for images in _image_groups(x, taps[0]):
        products = [_multiply(x[images], tap).to(out.dtype) for tap in taps]
        for index, image in enumerate(out[images]):
            _resample(image, [product[index] for product in products], rows, columns)


def _resample(image: Tensor, products: Sequence[Tensor], rows: Bands, columns: Bands) -> None:
    """Add products (h, w * kw * O), one for each vertical tap, to an image (H, W, O)."""
    n_channels = image.shape[-1]
    for bands in zip(*rows.taps, strict=True):
        start, stop = bands[0].start, bands[0].stop
        between: Tensor | None = None  # (rows, w * kw * O): full height, the branch's width
        for band, product in zip(bands, products, strict=True):
            part = product[band.first : band.last]
            between = band.matrix @ part if between is None else between.addmm_(band.matrix, part)
        assert between is not None
        stacked = between.view(stop - start, -1, n_channels)
        for band in columns.stacked:
            target = image[start:stop, band.start : band.stop]
            matrix = band.matrix.expand(stop - start, -1, -1)
            target.baddbmm_(matrix, stacked[:, band.first : band.last])


def branch_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `add_branch_` with regard to branch and weight, as far as needed.

    Args:
        grad: of the result, (B, H, W, O), contiguous, float32 or float64.
        x: branch (B, C, h, w).
        weight: its slice (O, C, kh, kw).
        geometry: size, convolution and resampling.
        needs: whether the branch's and the weight's gradient are wanted.
    """
    rows, columns = _matrices(grad, x, geometry)
    taps = _row_taps(weight)
    grad_x = torch.zeros_like(x, memory_format=torch.channels_last) if needs[0] else None
    grad_taps = [torch.zeros_like(tap) for tap in taps] if needs[1] else None
    for images in _image_groups(x, taps[0]):
        grad_products = _resample_back(grad[images], x.shape, len(taps), rows, columns)
        for index, (tap, grad_product) in enumerate(zip(taps, grad_products, strict=True)):
            dx, dtap = _multiply_backward(grad_product.to(x.dtype), x[images], tap, needs)
            if grad_x is not None:
                grad_x[images] += dx
            if grad_taps is not None:
                grad_taps[index] += dtap
    return grad_x, None if grad_taps is None else _weight_of(grad_taps, weight.shape)


def _resample_back(
    grad: Tensor, shape: torch.Size, n_taps: int, rows: Bands, columns: Bands
) -> list[Tensor]:
    """The transpose of `_resample` for a group of images: one (b, h, w * kw * O) for each tap."""
    height, n_channels = shape[2], grad.shape[-1]
    n_between = columns.transposed[-1].stop  # w * kw
    products = [grad.new_zeros(len(grad), height, n_between * n_channels) for _ in range(n_taps)]
    for index, image in enumerate(grad):
        for bands in zip(*rows.taps, strict=True):
            start, stop = bands[0].start, bands[0].stop
            between = grad.new_empty(stop - start, n_between, n_channels)
            for band in columns.transposed:
                matrix = band.matrix.expand(stop - start, -1, -1)
                source = image[start:stop, band.first : band.last]
                torch.bmm(matrix, source, out=between[:, band.start : band.stop])
            flat = between.view(stop - start, -1)
            for band, product in zip(bands, products, strict=True):
                product[index, band.first : band.last].addmm_(band.matrix.t(), flat)
    return products


def _matrices(out: Tensor, x: Tensor, geometry: Geometry) -> tuple[Bands, Bands]:
    """Matrices along height and width of a branch, in the result's dtype, on its device."""
    (height, width), key = x.shape[-2:], (out.dtype, out.device)
    row_items = out.shape[-1] * max(out.shape[2], width * geometry.columns.kernel)
    n_rows = max(1, min(32, BAND_BYTES // (row_items * out.element_size())))
    resampling = geometry.resampling
    return (
        banded_taps(height, geometry.size[0], resampling, geometry.rows, n_rows, *key),
        banded_taps(width, geometry.size[1], resampling, geometry.columns, 32, *key),
    )


def _image_groups(x: Tensor, tap: Tensor) -> Iterator[slice]:
    """As many images at a time as keep one product below `PRODUCT_BYTES`."""
    image_bytes = tap.shape[0] * x.shape[-2] * x.shape[-1] * 4
    n_images = max(1, PRODUCT_BYTES // max(1, image_bytes))
    for start in range(0, len(x), n_images):
        yield slice(start, min(start + n_images, len(x)))


def _row_taps(weight: Tensor) -> list[Tensor]:
    """For every vertical tap, a 1x1 weight (kw * O, C, 1, 1) holding its horizontal taps."""
    n_channels = weight.shape[1]
    rows = weight.permute(2, 3, 0, 1).contiguous()  # (kh, kw, O, C)
    return [row.reshape(-1, n_channels, 1, 1) for row in rows]


def _weight_of(taps: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Undo `_row_taps`."""
    n_out, n_in, height, width = shape
    stacked = torch.stack(list(taps)).view(height, width, n_out, n_in)
    return stacked.permute(2, 3, 0, 1).contiguous()


def _multiply(x: Tensor, tap: Tensor) -> Tensor:
    """Multiply (b, C, h, w) by (N, C, 1, 1) into (b, h, w * N), contiguous."""
    product = F.conv2d(x, tap, dilation=_dilation(x))
    return product.permute(0, 2, 3, 1).reshape(len(x), x.shape[2], -1)


def _multiply_backward(
    grad: Tensor, x: Tensor, tap: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    shape = (len(x), x.shape[2], x.shape[3], len(tap))
    dilation = [_dilation(x)] * 2
    mask = [*needs, False]
    dx, dtap, _ = torch.ops.aten.convolution_backward(
        grad.view(shape).permute(0, 3, 1, 2),
        x, tap, None, [1, 1], [0, 0], dilation, False, [0, 0], 1, mask,
    )  # fmt: skip
    return dx, dtap


def _dilation(x: Tensor) -> int:
    """2 on the CPU: meaningless for a 1x1 kernel, but ATen hands dilated kernels to oneDNN.

    Undilated ones go to MKL when there is one thread, which on AMD processors multiplies at half
    the speed (118 against 270 GFLOP/s on one core of an EPYC 9005).
    """
    return 2 if x.device.type == "cpu" else 1
