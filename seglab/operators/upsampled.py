"""Loss and argmax of upsampled logits, without the upsampled logits.

Logits at the size of the label are the largest tensor of a training step (150 classes at 512 x 512,
batch 8: 1.3 GB, and as much again for each of their derivatives). Here a few rows at a time are
upsampled, turned into loss and gradient, and the gradient brought back to the logits' resolution at
once, while they are in the cache. Exact: the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seglab.operators.observers import needs_ordinary_operations
from seglab.operators.resampling import Bands, Resampling, Window, banded_taps

Size = tuple[int, int]

BAND_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Of upsampled logits at a time: about a second-level cache, or enough to fill a GPU."""

_NO_LABEL = torch.iinfo(torch.int64).min  # torch's default would let -100 pass


@dataclass(frozen=True)
class Stretch:
    """How logits come to the size they are compared at.

    Attributes:
        resampling: how they are resized.
        through: height and width of the image, if they are resized to that first and bilinearly
            from there on, as in evaluation at the label's own size.
    """

    resampling: Resampling = field(default_factory=Resampling)
    through: Size | None = None

    def __call__(self, logits: Tensor, size: Size) -> Tensor:
        """Resize (B, K, h, w) to `size`.

        >>> Stretch(through=(6, 6))(torch.zeros(1, 2, 3, 3), (8, 8)).shape
        torch.Size([1, 2, 8, 8])
        """
        if self.through is None:
            return self.resampling(logits, size)
        return Resampling()(self.resampling(logits, self.through), size)


BILINEAR = Stretch()


def upsampled_nll(
    logits: Tensor, target: Tensor, coefficient: Tensor, stretch: Stretch = BILINEAR
) -> Tensor:
    """Sum of coefficient times negative log-likelihood of the target, at the target's size.

    Equals, without the full-size tensors,
    `(coefficient * F.cross_entropy(resize(logits), target, reduction="none")).sum()`.

    Args:
        logits: (B, K, h, w); half precision is computed in float32.
        target: class ids in [0, K), (B, H, W), int64.
        coefficient: factor of each pixel, (B, H, W); zero ignores it, whatever the logits are
            there, infinity and NaN included. Gets no gradient.
        stretch: how logits are brought to the target's size.

    Returns:
        A scalar, float32 (float64 for such logits).

    >>> logits, target = torch.zeros(1, 2, 2, 2), torch.ones(1, 4, 4, dtype=torch.int64)
    >>> upsampled_nll(logits, target, torch.full((1, 4, 4), 1 / 16))  # log(2)
    tensor(0.6931)
    """
    if needs_ordinary_operations(logits, target, coefficient):
        return _plain_nll(logits, target, coefficient, stretch)
    wants_gradient = logits.requires_grad and torch.is_grad_enabled()
    code = _encode(stretch)
    loss: Tensor = _nll(logits, target, coefficient.detach(), code, wants_gradient)[0]
    return loss


def upsampled_log_likelihood(
    logits: Tensor, target: Tensor, stretch: Stretch = BILINEAR, counted: Tensor | None = None
) -> Tensor:
    """Log-probability of the target at every pixel, without gradient.

    Args:
        logits: (B, K, h, w).
        target: class ids in [0, K), (B, H, W), int64.
        stretch: how logits are brought to the target's size.
        counted: where the result is wanted, (B, H, W); logits that have a part only in other pixels
            may be anything.

    Returns:
        (B, H, W), float32 (float64 for such logits).
    """
    out = torch.empty(target.shape, dtype=_dtype(logits), device=logits.device)
    with torch.no_grad():
        for rows in _each_band(logits, (target.shape[1], target.shape[2]), stretch, counted):
            log_probability = rows.logits.log_softmax(dim=-1)
            chosen = log_probability.gather(-1, rows.of(target).unsqueeze(-1))
            rows.of(out).copy_(chosen.squeeze(-1))
    return out


def upsampled_argmax(logits: Tensor, size: Size, stretch: Stretch = BILINEAR) -> Tensor:
    """Class of the largest upsampled logit at every pixel.

    Args:
        logits: (B, K, h, w).
        size: height and width of the result.
        stretch: how logits are brought to that size.

    Returns:
        (B, *size), uint8 up to 256 classes, else int64.

    >>> upsampled_argmax(torch.eye(2).view(1, 2, 1, 2), (1, 4))
    tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    """
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
    out = torch.empty(len(logits), *size, dtype=dtype, device=logits.device)
    with torch.no_grad():
        for rows in _each_band(logits, size, stretch):
            rows.of(out).copy_(rows.logits.argmax(dim=-1))
    return out


@dataclass(frozen=True)
class _Rows:
    """A band of rows of one image: upsampled `logits` (rows, W, K)."""

    image: int
    start: int
    stop: int
    logits: Tensor

    def of(self, pixels: Tensor) -> Tensor:
        """The same rows of (B, H, W)."""
        return pixels[self.image, self.start : self.stop]


def _each_band(
    logits: Tensor, size: Size, stretch: Stretch, counted: Tensor | None = None
) -> Iterator[_Rows]:
    low = logits.detach().permute(0, 2, 3, 1)
    low = low.to(_dtype(logits), copy=True, memory_format=torch.contiguous_format)
    # The interpolation's sums have factors of 0, and 0 * inf is NaN: a class masked by -inf gets
    # a finite number of the same probability, 0, and what no counted pixel is made of, any number.
    low.clamp_min_(torch.finfo(low.dtype).min / 2)
    if counted is not None:
        low.masked_fill_(~_reached(counted, low, stretch), 0)
    rows, columns = _matrices(low, size, stretch)
    for image in range(len(low)):
        for band in rows.taps[0]:
            start, stop = band.start, band.stop
            part = low[image, band.first : band.last].flatten(1)
            between = (band.matrix @ part).view(stop - start, *low.shape[2:])  # (rows, w, K)
            up = between.new_empty(stop - start, size[1], low.shape[3])
            for narrow in columns.stacked:
                matrix = narrow.matrix.expand(stop - start, -1, -1)
                source = between[:, narrow.first : narrow.last]
                torch.bmm(matrix, source, out=up[:, narrow.start : narrow.stop])
            yield _Rows(image, start, stop, up)


def _reached(counted: Tensor, low: Tensor, stretch: Stretch) -> Tensor:
    """Which logits, (B, h, w, 1), have a part in a pixel that counts, (B, H, W)."""
    rows, columns = (
        _takes_part(low.shape[1 + axis], counted.shape[1 + axis], stretch, axis, low.device)
        for axis in (0, 1)
    )
    return (rows.T @ counted.float() @ columns).unsqueeze(-1) > 0


def _takes_part(n_in: int, n_out: int, stretch: Stretch, axis: int, device: torch.device) -> Tensor:
    """1 where a position of the axis (column) has a part in a resized one (row), else 0."""
    through = (stretch.through[axis], n_in) if stretch.through else None
    unit = torch.eye(n_in, device=device)[None, None]
    return (Stretch(stretch.resampling, through)(unit, (n_out, n_in)) != 0)[0, 0].float()


def _matrices(low: Tensor, size: Size, stretch: Stretch) -> tuple[Bands, Bands]:
    _, height, width, n_classes = low.shape
    row_bytes = max(size[1], width) * n_classes * low.element_size()
    n_rows = max(1, BAND_BYTES[low.device.type] // row_bytes)
    how, key, via = stretch.resampling, (low.dtype, low.device), stretch.through or (None, None)
    return (
        banded_taps(height, size[0], how, Window(1), n_rows, *key, via[0]),
        banded_taps(width, size[1], how, Window(1), 32, *key, via[1]),
    )


@torch.library.custom_op(
    "seglab::upsampled_nll",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor coefficient, int[] stretch, bool with_gradient)"
    " -> (Tensor, Tensor)",
)
def _nll(
    logits: Tensor, target: Tensor, coefficient: Tensor, stretch: list[int], with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with regard to the logits (empty if not wanted)."""
    how, size = _decode(stretch), (target.shape[1], target.shape[2])
    dtype = _dtype(logits)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    with torch.autocast(logits.device.type, enabled=False):
        gradient = _LowGradient(logits, size, how) if with_gradient else None
        for rows in _each_band(logits, size, how, coefficient != 0):
            log_probability = rows.logits.log_softmax(dim=-1)
            index = rows.of(target).unsqueeze(-1)
            factor = rows.of(coefficient).to(dtype).unsqueeze(-1)
            likelihood = log_probability.gather(-1, index)
            # Selected: a pixel that does not count may be anything, and 0 * inf is NaN.
            total -= torch.where(factor == 0, 0, likelihood * factor).sum(dtype=torch.float64)
            if gradient is not None:
                # softmax minus one-hot
                slope = log_probability.exp_().mul_(factor).scatter_add_(-1, index, -factor)
                gradient.add_(rows, slope)
    return total.to(dtype), logits.new_empty(0) if gradient is None else gradient.result()


class _LowGradient:
    """Adds up gradients of bands of rows, brought back to the logits' resolution."""

    def __init__(self, logits: Tensor, size: Size, stretch: Stretch) -> None:
        self.logits = logits
        n_images, n_classes, height, width = logits.shape
        shape = (n_images, height, width, n_classes)
        self.sums = torch.zeros(shape, dtype=_dtype(logits), device=logits.device)
        self.rows, self.columns = _matrices(self.sums, size, stretch)
        self.bands = {band.start: band for band in self.rows.taps[0]}

    def add_(self, rows: _Rows, slope: Tensor) -> None:
        """Add the gradient (rows, W, K) with regard to the upsampled logits of `rows`."""
        n_rows, (width, n_classes) = len(slope), self.sums.shape[2:]
        between = slope.new_empty(n_rows, width, n_classes)
        for narrow in self.columns.transposed:
            matrix = narrow.matrix.expand(n_rows, -1, -1)
            source = slope[:, narrow.first : narrow.last]
            torch.bmm(matrix, source, out=between[:, narrow.start : narrow.stop])
        band = self.bands[rows.start]
        target = self.sums[rows.image, band.first : band.last].view(band.last - band.first, -1)
        target.addmm_(band.matrix.t(), between.view(n_rows, -1))

    def result(self) -> Tensor:
        """The gradient in the shape, dtype and memory format of the logits."""
        gradient = torch.empty_like(self.logits, memory_format=torch.contiguous_format)
        return gradient.copy_(self.sums.permute(0, 3, 1, 2))


@_nll.register_fake
def _(
    logits: Tensor, target: Tensor, coefficient: Tensor, stretch: list[int], with_gradient: bool
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return logits.new_empty((), dtype=_dtype(logits)), (
        gradient if with_gradient else logits.new_empty(0)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, coefficient, ctx.stretch, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], logits, target, coefficient)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    gradient, logits, target, coefficient = ctx.saved_tensors
    if torch.is_grad_enabled():  # to be differentiated again: the plain way
        alias = logits.view_as(logits)
        loss = _plain_nll(alias, target, coefficient, _decode(ctx.stretch))
        (gradient,) = torch.autograd.grad(loss, alias, create_graph=True)
    return (gradient * grad).to(logits.dtype), None, None, None, None


_nll.register_autograd(_backward, setup_context=_setup_context)


def _plain_nll(logits: Tensor, target: Tensor, coefficient: Tensor, stretch: Stretch) -> Tensor:
    full = stretch(logits.to(_dtype(logits)), (target.shape[1], target.shape[2]))
    full = full.masked_fill((coefficient == 0).unsqueeze(1), 0)
    losses = F.cross_entropy(full, target, reduction="none", ignore_index=_NO_LABEL)
    return (losses * coefficient).sum()


def _encode(stretch: Stretch) -> list[int]:
    how = stretch.resampling
    return [int(how.mode == "nearest"), int(how.align_corners), *(stretch.through or (0, 0))]


def _decode(code: list[int]) -> Stretch:
    resampling = Resampling("nearest" if code[0] else "bilinear", bool(code[1]))
    return Stretch(resampling, (code[2], code[3]) if code[2] else None)


def _dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
