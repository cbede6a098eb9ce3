"""Loss and argmax of upsampled logits, without the upsampled logits.

Logits at the size of the label are the largest tensor of a training step (150 classes at 512 x 512,
batch 8: 1.3 GB, and as much again for each of their derivatives). Here a few rows at a time are
upsampled, turned into loss and gradient, and the gradient brought back to the logits' resolution at
once, while they are in the cache. Exact: the same numbers up to rounding. Under autocast, as
`F.cross_entropy` does, all of it is computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seglab.operators.logit_resize import BILINEAR, LogitResize, Size
from seglab.operators.observers import requires_plain_operators
from seglab.operators.resampling import Resampling, sources_along

BAND_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Of upsampled logits at a time: about a second-level cache, or enough to fill a GPU."""

_NO_LABEL = 1 - 2**63  # torch's default would let -100 pass


def upsampled_nll(
    logits: Tensor, target: Tensor, coefficient: Tensor, resize: LogitResize = BILINEAR
) -> Tensor:
    """Sum of coefficient times negative log-likelihood of the target, at the target's size.

    Equals, without the full-size tensors,
    `(coefficient * F.cross_entropy(resize(logits), target, reduction="none")).sum()`.

    Args:
        logits: (B, K, h, w); half precision is computed in float32.
        target: class ids in [0, K), (B, H, W), int64.
        coefficient: factor of each pixel, (B, H, W); zero ignores it, whatever the logits are
            there, infinity and NaN included. Gets no gradient.
        resize: how logits are brought to the target's size.

    Returns:
        A scalar, float32 (float64 for such logits).

    >>> logits, target = torch.zeros(1, 2, 2, 2), torch.ones(1, 4, 4, dtype=torch.int64)
    >>> upsampled_nll(logits, target, torch.full((1, 4, 4), 1 / 16))  # log(2)
    tensor(0.6931)
    """
    if requires_plain_operators(logits, target, coefficient):
        return _plain_nll(logits, target, coefficient, resize)
    wants_gradient = logits.requires_grad and torch.is_grad_enabled()
    code = _encode(resize)
    loss: Tensor = _nll(logits, target, coefficient.detach(), code, wants_gradient)[0]
    return loss


def upsampled_log_likelihood(
    logits: Tensor, target: Tensor, resize: LogitResize = BILINEAR, counted: Tensor | None = None
) -> Tensor:
    """Log-probability of the target at every pixel, without gradient.

    Args:
        logits: (B, K, h, w).
        target: class ids in [0, K), (B, H, W), int64.
        resize: how logits are brought to the target's size.
        counted: where the result is wanted, (B, H, W); logits that have a part only in other pixels
            may be anything.

    Returns:
        (B, H, W), float32 (float64 for such logits).
    """
    size = (target.shape[1], target.shape[2])
    with torch.no_grad(), _without_autocast(logits):
        if _is_seen_through(logits, target):
            log_probability = _plain_resize(logits, size, resize).log_softmax(dim=1)
            return log_probability.gather(1, target.unsqueeze(1)).squeeze(1)
        out = torch.empty(target.shape, dtype=_dtype(logits), device=logits.device)
        for rows in _each_band(logits, size, resize, counted):
            log_probability = rows.logits.log_softmax(dim=-1)
            chosen = log_probability.gather(-1, rows.of(target).unsqueeze(-1))
            rows.of(out).copy_(chosen.squeeze(-1))
    return out


def upsampled_argmax(logits: Tensor, size: Size, resize: LogitResize = BILINEAR) -> Tensor:
    """Class of the largest upsampled logit at every pixel.

    Args:
        logits: (B, K, h, w).
        size: height and width of the result.
        resize: how logits are brought to that size.

    Returns:
        (B, *size), uint8 up to 256 classes, else int64.

    >>> upsampled_argmax(torch.eye(2).view(1, 2, 1, 2), (1, 4))
    tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    """
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
    with torch.no_grad(), _without_autocast(logits):
        if _is_seen_through(logits):
            return _plain_resize(logits, size, resize).argmax(dim=1).to(dtype)
        out = torch.empty(len(logits), *size, dtype=dtype, device=logits.device)
        for rows in _each_band(logits, size, resize):
            # Twice as fast as argmax on the CPU; of equals, both give the first.
            rows.of(out).copy_(rows.logits.max(dim=-1).indices)
    return out


def upsampled_confidence(
    logits: Tensor, size: Size, resize: LogitResize = BILINEAR
) -> tuple[Tensor, Tensor]:
    """The classes of `upsampled_argmax`, and the softmax of each, float32 (B, *size).

    >>> upsampled_confidence(torch.zeros(1, 4, 1, 1), (1, 2))[1]
    tensor([[[0.2500, 0.2500]]])
    """
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
    with torch.no_grad(), _without_autocast(logits):
        if _is_seen_through(logits):
            full = _plain_resize(logits, size, resize)
            largest, ids = full.max(dim=1)
            return ids.to(dtype), (largest - full.logsumexp(dim=1)).exp().float()
        out = torch.empty(len(logits), *size, dtype=dtype, device=logits.device)
        confidence = torch.empty(out.shape, device=logits.device)
        for rows in _each_band(logits, size, resize):
            largest, ids = rows.logits.max(dim=-1)
            rows.of(out).copy_(ids)
            rows.of(confidence).copy_((largest - rows.logits.logsumexp(dim=-1)).exp_())
    return out, confidence


def _without_autocast(logits: Tensor) -> torch.autocast:
    return torch.autocast(logits.device.type, enabled=False)


def _is_seen_through(*tensors: Tensor) -> bool:
    """Whether a compiler, or whoever watches, is to see one operation instead of many bands."""
    return torch.compiler.is_compiling() or requires_plain_operators(*tensors)


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
    logits: Tensor, size: Size, resize: LogitResize, counted: Tensor | None = None
) -> Iterator[_Rows]:
    low = logits.detach().permute(0, 2, 3, 1)  # (B, h, w, K)
    low = low.to(_dtype(logits), copy=True, memory_format=torch.contiguous_format)
    # A class masked by -inf gets a finite number of the same probability, 0, since a factor of 0
    # times infinity is NaN; what no counted pixel is made of gets any number.
    low.clamp_min_(torch.finfo(low.dtype).min / 2)
    if counted is not None:
        low.masked_fill_(~_reached(counted, low, resize), 0)
    pixels, weights = _sources(low, size, resize, axis=0)
    row_bytes = max(size[1], low.shape[2]) * low.shape[3] * low.element_size()
    n_rows = max(1, BAND_BYTES[low.device.type] // row_bytes)
    for image in range(len(low)):
        for start in range(0, size[0], n_rows):
            stop = min(start + n_rows, size[0])
            parts = zip(pixels[:, start:stop], weights[:, start:stop], strict=True)
            weighted = (low[image].index_select(0, p).mul_(w.view(-1, 1, 1)) for p, w in parts)
            between = reduce(Tensor.add_, weighted)  # (n, w, K)
            yield _Rows(image, start, stop, resize.columns(between, size[1]))


def _reached(counted: Tensor, low: Tensor, resize: LogitResize) -> Tensor:
    """Which logits, (B, h, w, 1), have a part in a pixel that counts, (B, H, W)."""
    rows, columns = (
        _takes_part(low.shape[1 + axis], counted.shape[1 + axis], resize, axis, low.device)
        for axis in (0, 1)
    )
    return (rows.T @ counted.float() @ columns).unsqueeze(-1) > 0


def _takes_part(
    n_in: int, n_out: int, resize: LogitResize, axis: int, device: torch.device
) -> Tensor:
    """1 where a position of the axis (column) has a part in a resized one (row), else 0."""
    through = (resize.through[axis], n_in) if resize.through else None
    unit = torch.eye(n_in, device=device)[None, None]
    return (LogitResize(resize.resampling, through)(unit, (n_out, n_in)) != 0)[0, 0].float()


def _sources(low: Tensor, size: Size, resize: LogitResize, axis: int) -> tuple[Tensor, Tensor]:
    through = None if resize.through is None else resize.through[axis]
    key = (resize.resampling, low.dtype, low.device, through)
    return sources_along(low.shape[1 + axis], size[axis], *key)


@torch.library.custom_op(
    "seglab::upsampled_nll",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor coefficient, int[] resize, bool with_gradient)"
    " -> (Tensor, Tensor)",
)
def _nll(
    logits: Tensor, target: Tensor, coefficient: Tensor, resize: list[int], with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with regard to the logits (empty if not wanted)."""
    how, size = _decode(resize), (target.shape[1], target.shape[2])
    dtype = _dtype(logits)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    with torch.no_grad(), _without_autocast(logits):
        gradient = _LowGradient(logits, size, how) if with_gradient else None
        for rows in _each_band(logits, size, how, coefficient != 0):
            log_probability = rows.logits.log_softmax(dim=-1)
            index = rows.of(target).unsqueeze(-1)
            factor = rows.of(coefficient).to(dtype).unsqueeze(-1)
            chosen = log_probability.gather(-1, index)
            # Selected: a pixel that does not count may be anything, and 0 * inf is NaN.
            total -= (chosen * factor).masked_fill_(factor == 0, 0).sum(dtype=torch.float64)
            if gradient is not None:
                # softmax minus one-hot
                slope = log_probability.exp_().mul_(factor).scatter_add_(-1, index, -factor)
                if _may_be_nan(chosen):
                    slope.masked_fill_(factor == 0, 0)
                gradient.add_(rows, slope)
    none = logits.new_empty(0, dtype=dtype)
    return total.to(dtype), none if gradient is None else gradient.result()


def _may_be_nan(values: Tensor) -> bool:
    """Whether to reckon with NaN: known on the CPU; elsewhere the host would have to wait."""
    return values.device.type != "cpu" or not bool(values.sum().isfinite())


class _LowGradient:
    """Adds up gradients of bands of rows, brought back to the logits' resolution."""

    def __init__(self, logits: Tensor, size: Size, resize: LogitResize) -> None:
        self.logits = logits
        self.resize = resize
        n_images, n_classes, height, width = logits.shape
        shape = (n_images, height, width, n_classes)
        self.sums = torch.zeros(shape, dtype=_dtype(logits), device=logits.device)
        self.rows, self.columns = (_sources(self.sums, size, resize, axis) for axis in (0, 1))

    def add_(self, rows: _Rows, slope: Tensor) -> None:
        """Add the gradient (rows, W, K) with regard to the upsampled logits of `rows`."""
        width = self.sums.shape[2]
        if slope.device.type == "cpu":
            between = self.resize.columns_transposed(slope, width)
        else:  # torch's own could not be made deterministic
            between = slope.new_zeros(len(slope), width, slope.shape[2])
            _add_transposed_(between, slope, self.columns, 1)
        own = slice(rows.start, rows.stop)
        sources = self.rows[0][:, own], self.rows[1][:, own]
        _add_transposed_(self.sums[rows.image], between, sources, 0)

    def result(self) -> Tensor:
        """The gradient in the shape and memory format of the logits.

        Not yet in their dtype: the divisor of the loss and the loss scale are still to come, and
        without them it may be more than half precision can hold.
        """
        return self.sums.permute(0, 3, 1, 2).contiguous()


def _add_transposed_(out: Tensor, grad: Tensor, sources: tuple[Tensor, Tensor], axis: int) -> None:
    """Add to `out` the gradient `grad` of a map that was resized along `axis`."""
    shape = [-1 if index == axis else 1 for index in range(grad.ndim)]
    for pixels, weights in zip(*sources, strict=True):
        out.index_add_(axis, pixels, grad * weights.view(shape))


@_nll.register_fake
def _(
    logits: Tensor, target: Tensor, coefficient: Tensor, resize: list[int], with_gradient: bool
) -> tuple[Tensor, Tensor]:
    gradient = logits.new_empty(logits.shape, dtype=_dtype(logits))
    return logits.new_empty((), dtype=_dtype(logits)), (
        gradient if with_gradient else logits.new_empty(0, dtype=_dtype(logits))
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, coefficient, ctx.resize, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], logits, target, coefficient)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    gradient, logits, target, coefficient = ctx.saved_tensors
    if torch.is_grad_enabled():  # to be differentiated again: the plain way
        alias = logits.view_as(logits)
        with _without_autocast(logits):
            loss = _plain_nll(alias, target, coefficient, _decode(ctx.resize))
        (gradient,) = torch.autograd.grad(loss, alias, create_graph=True)
    return (gradient * grad).to(logits.dtype), None, None, None, None


_nll.register_autograd(_backward, setup_context=_setup_context)


def _plain_nll(logits: Tensor, target: Tensor, coefficient: Tensor, resize: LogitResize) -> Tensor:
    full = _plain_resize(logits, (target.shape[1], target.shape[2]), resize)
    full = full.masked_fill((coefficient == 0).unsqueeze(1), 0)  # whatever is there is ignored
    losses = F.cross_entropy(full, target, reduction="none", ignore_index=_NO_LABEL)
    return (losses * coefficient).sum()


def _plain_resize(logits: Tensor, size: Size, resize: LogitResize) -> Tensor:
    return resize(logits.to(_dtype(logits)), size)


def _encode(resize: LogitResize) -> list[int]:
    how = resize.resampling
    return [int(how.mode == "nearest"), int(how.align_corners), *(resize.through or (0, 0))]


def _decode(code: list[int]) -> LogitResize:
    resampling = Resampling("nearest" if code[0] else "bilinear", bool(code[1]))
    return LogitResize(resampling, (code[2], code[3]) if code[2] else None)


def _dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
