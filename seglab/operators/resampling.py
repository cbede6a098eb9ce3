"""Interpolation along one axis as a matrix, and what a convolution tap makes of it.

Bilinear and nearest resizing are separable and linear: `up(x) = A x Bᵀ` with one matrix per axis. A
convolution tap at offset t reads the resized map shifted by t, and zero beyond its border: the same
matrix with its rows shifted and zero rows filled in. Both have at most two entries in a row, so the
matrices are cut into bands of rows, each of which stores only the columns it touches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Resampling:
    """How a branch is brought to the fusion's size.

    Attributes:
        mode: "bilinear" or "nearest", as in `torch.nn.functional.interpolate`.
        align_corners: for "bilinear", whether corner pixels (not their edges) coincide.

    Raises:
        ValueError: another mode, or corners to align without interpolation between them.
    """

    mode: str = "bilinear"
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("bilinear", "nearest"):
            raise ValueError(f"mode is 'bilinear' or 'nearest', got {self.mode!r}")
        if self.align_corners and self.mode != "bilinear":
            raise ValueError(f"align_corners=True needs mode='bilinear', got {self.mode!r}")

    def __call__(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize (B, C, h, w) to `size`; equal sizes pass untouched.

        >>> Resampling("nearest")(torch.zeros(1, 3, 4, 4), (8, 6)).shape
        torch.Size([1, 3, 8, 6])
        """
        if tuple(x.shape[-2:]) == tuple(size):
            return x
        if self.mode == "nearest":
            return F.interpolate(x, size=size, mode="nearest")
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)

    def transpose(self, grad: Tensor, size: tuple[int, int]) -> Tensor:
        """Gradient with regard to a map (B, C, *size), given that of the resized map.

        For use where autograd does not record.

        >>> Resampling("nearest").transpose(torch.ones(1, 1, 4, 6), (2, 3))
        tensor([[[[4., 4., 4.],
                  [4., 4., 4.]]]])
        """
        if tuple(grad.shape[-2:]) == tuple(size):
            return grad
        sizes = list(grad.shape[-2:]), [*grad.shape[:2], *size]
        if self.mode == "nearest":
            nearest: Tensor = torch.ops.aten.upsample_nearest2d_backward(grad, *sizes)
            return nearest
        bilinear: Tensor = torch.ops.aten.upsample_bilinear2d_backward(
            grad, *sizes, self.align_corners
        )
        return bilinear


@dataclass(frozen=True)
class ConvAxis:
    """A convolution along one axis: kernel, stride, padding (zeros, each side) and dilation.

    >>> ConvAxis(3, padding=1).n_out(10)
    10
    """

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    def n_out(self, n_in: int) -> int:
        """Length of the result over an axis of `n_in` pixels."""
        reach = self.dilation * (self.kernel - 1) + 1
        return (n_in + 2 * self.padding - reach) // self.stride + 1


@dataclass(frozen=True)
class Band:
    """Rows [start, stop) of a sparse matrix, which is zero outside columns [first, last)."""

    start: int
    stop: int
    first: int
    last: int
    matrix: Tensor  # (stop - start, last - first)


def tap_matrices(
    n_in: int,
    n_resized: int,
    resampling: Resampling,
    conv: ConvAxis,
    through: int | None = None,
) -> Tensor:
    """For every tap of the kernel, the matrix from a branch's axis to the result's.

    Args:
        n_in: pixels of the branch.
        n_resized: pixels after resizing, which the convolution would read.
        resampling: how it is resized.
        conv: the convolution.
        through: pixels of a size in between: resized to that first, bilinearly from there on.

    Returns:
        (kernel, conv.n_out(n_resized), n_in), float64: row p of tap t holds the interpolation
        weights of resized pixel `p * stride + t * dilation - padding`, or zeros beyond the border.

    >>> tap_matrices(1, 3, Resampling(), ConvAxis(3, padding=1))[:, :, 0]  # but for ends
    tensor([[0., 1., 1.],
            [1., 1., 1.],
            [1., 1., 0.]], dtype=torch.float64)
    """
    # Asking interpolate itself keeps its rounding of source positions.
    resized = torch.eye(n_in, dtype=torch.float64)[None, None]
    if through is not None:
        resized, resampling = resampling(resized, (through, n_in)), Resampling()
    resized = resampling(resized, (n_resized, n_in))[0, 0]
    n_out = conv.n_out(n_resized)
    taps = torch.zeros(conv.kernel, n_out, n_in, dtype=torch.float64)
    for tap in range(conv.kernel):
        source = torch.arange(n_out) * conv.stride + tap * conv.dilation - conv.padding
        inside = (source >= 0) & (source < n_resized)
        taps[tap, inside] = resized[source[inside]]
    return taps


def cut_into_bands(matrix: Tensor, n_rows: int) -> tuple[Band, ...]:
    """Cut a (rows, columns) matrix into bands of at most `n_rows` rows.

    >>> [(band.first, band.last) for band in cut_into_bands(torch.eye(4), 2)]
    [(0, 2), (2, 4)]
    """
    return tuple(
        _band(matrix, start, min(start + n_rows, len(matrix)))
        for start in range(0, len(matrix), n_rows)
    )


def _band(matrix: Tensor, start: int, stop: int) -> Band:
    touched = matrix[start:stop].ne(0).any(dim=0).nonzero().flatten().tolist()
    first, last = (touched[0], touched[-1] + 1) if touched else (0, 0)
    return Band(start, stop, first, last, matrix[start:stop, first:last].contiguous())


@dataclass(frozen=True)
class Bands:
    """The matrices of one axis of one branch, ready to multiply with.

    Attributes:
        taps: for each tap, bands of its matrix (n_out, n_in); all taps are cut at the same rows.
        stacked: bands of (n_out, n_in * kernel), which adds the taps up: column j * kernel + t
            belongs to pixel j and tap t.
        transposed: bands of the transpose of that, (n_in * kernel, n_out).
    """

    taps: tuple[tuple[Band, ...], ...]
    stacked: tuple[Band, ...]
    transposed: tuple[Band, ...]


@lru_cache(maxsize=512)
def banded_taps(
    n_in: int,
    n_resized: int,
    resampling: Resampling,
    conv: ConvAxis,
    n_rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Bands:
    """Matrices of `tap_matrices`, cut into bands of `n_rows` rows; cached.

    Args:
        n_in: pixels of the branch.
        n_resized: pixels after resizing.
        resampling: how it is resized.
        conv: the convolution.
        n_rows: rows of a band.
        dtype: of the matrices.
        device: of the matrices.
    """
    with torch.inference_mode(False):  # the cache outlives whoever asked first
        taps = tap_matrices(n_in, n_resized, resampling, conv).to(device, dtype)
        stacked = taps.permute(1, 2, 0).reshape(taps.shape[1], -1)
        return Bands(
            taps=tuple(cut_into_bands(tap, n_rows) for tap in taps),
            stacked=_bands_if_sparse(stacked, n_rows),
            transposed=_bands_if_sparse(stacked.t(), n_rows * conv.kernel),
        )


def _bands_if_sparse(matrix: Tensor, n_rows: int) -> tuple[Band, ...]:
    """Bands, or one for the whole matrix where bands would hardly save multiplications."""
    bands = cut_into_bands(matrix, n_rows)
    if sum(band.matrix.numel() for band in bands) > 0.6 * matrix.numel():
        return cut_into_bands(matrix, max(1, len(matrix)))
    return bands


@lru_cache(maxsize=512)
def sources_along(
    n_in: int,
    n_out: int,
    resampling: Resampling,
    dtype: torch.dtype,
    device: torch.device,
    through: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Which pixels each pixel of a resized axis is made of, and their weights; cached.

    Unlike a product with a matrix, their weighted sum reads no pixel that has no part in it: NaN
    and infinities stay where they are. Each class is added up alike, so equal ones stay equal.

    Args:
        n_in: pixels of the axis.
        n_out: pixels after resizing.
        resampling: how it is resized.
        dtype: of the weights.
        device: of both results.
        through: pixels of a size in between: resized to that first, bilinearly from there on.

    Returns:
        (n, n_out) pixels and their weights; n is 1 for nearest, 2 for bilinear, up to 4 through
        another size. Where fewer take part, the first is repeated with weight 0.

    >>> pixels, weights = sources_along(2, 4, Resampling(), torch.float32, torch.device("cpu"))
    >>> pixels.tolist(), weights.tolist()
    ([[0, 0, 0, 1], [0, 1, 1, 1]], [[1.0, 0.75, 0.25, 1.0], [0.0, 0.25, 0.75, 0.0]])
    """
    with torch.inference_mode(False):  # as above
        matrix = tap_matrices(n_in, n_out, resampling, ConvAxis(1), through)[0]
        n = int(matrix.ne(0).sum(dim=1).max())
        order = matrix.ne(0).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n]
        weights = matrix.gather(1, order)
        pixels = torch.where(weights != 0, order, order[:, :1])
        return pixels.t().contiguous().to(device), weights.t().to(device, dtype).contiguous()
