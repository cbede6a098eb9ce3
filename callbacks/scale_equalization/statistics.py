"""Count, mean and squared deviations of a stream of values, merged as Chan et al. do. A leaf.

Every update is reduced on the values' own device in their own precision (float32 at least) around
a shift close to their mean, so that nothing cancels, and only three numbers go on in float64.
Nothing here waits for the device: reading a property does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Moments:
    """Running moments over all elements of all tensors seen, in float64.

    Chan, Golub & LeVeque (1983), "Algorithms for computing the sample variance".
    The variance is the population variance (divided by the count), as in the paper's Algorithm 1.

    >>> moments = Moments()
    >>> _ = moments.update(torch.tensor([1.0, 2.0])).update(torch.tensor([3.0, 6.0]))
    >>> moments.count, moments.mean, moments.variance
    (4, 3.0, 3.5)
    """

    def __init__(self) -> None:
        self.state = torch.zeros(3, dtype=torch.float64, device="cpu")

    @classmethod
    def from_state(cls, state: Tensor) -> Moments:
        """Moments from (count, mean, M2), a float64 tensor of shape (3,)."""
        moments = cls()
        moments.state = state
        return moments

    def update(self, values: Tensor) -> Moments:
        """Take in every element of `values` (any shape, real); returns self."""
        if values.numel():
            self.state = _merge(self.state.to(_home(values)), _summarize(values))
        return self

    def merge(self, other: Moments) -> Moments:
        """Take in what `other` has seen; returns self."""
        self.state = _merge(self.state, other.state.to(self.state.device))
        return self

    @property
    def count(self) -> int:
        """Number of elements seen."""
        return int(self.state[0].item())

    @property
    def mean(self) -> float:
        """Mean of all elements; 0.0 before the first."""
        return float(self.state[1].item())

    @property
    def M2(self) -> float:  # noqa: N802  (the literature's name)
        """Sum of squared deviations from the mean."""
        return float(self.state[2].item())

    @property
    def variance(self) -> float:
        """Population variance; 0.0 before the first element."""
        return self.M2 / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return math.sqrt(self.variance)

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean:.6g}, std={self.std:.6g})"


def is_constant(mean: float, std: float) -> bool:
    """Whether a branch varies no more than by rounding."""
    return std <= 1e-6 * abs(mean) or std < 1e-290


def varying_std(moments: Moments) -> float:
    """The standard deviation; 0 where it is but rounding."""
    return 0.0 if is_constant(moments.mean, moments.std) else moments.std


def _home(values: Tensor) -> torch.device:
    """Where float64 can live: the values' device, but the CPU for those that lack float64."""
    return torch.device("cpu") if values.device.type == "mps" else values.device


def _summarize(values: Tensor) -> Tensor:
    """(count, mean, M2) of one tensor, float64, without waiting for the device.

    Deviations are divided by a power of two near their range, so that no square leaves float32.
    """
    values = values.detach()
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    shift = values.mean()
    deviations = values - shift
    unit = _power_of_two(deviations)
    deviations.div_(unit)
    home = _home(values)
    unit, shift = unit.to(home).double(), shift.to(home).double()
    total = deviations.sum().to(home).double()
    squares = deviations.square_().sum().to(home).double()
    count = torch.full_like(total, values.numel())
    return torch.stack(
        (count, shift + unit * total / count, unit**2 * (squares - total**2 / count))
    )


def _power_of_two(deviations: Tensor) -> Tensor:
    """The power of two at the largest magnitude; 1 where all are zero."""
    low, high = deviations.aminmax()
    _, exponent = torch.frexp(torch.maximum(high, -low))
    return torch.ldexp(torch.ones_like(high), exponent.clamp(-120, 120))


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """Chan's update of two states (count, mean, M2)."""
    count = a[0] + b[0]
    share = b[0] / count.clamp(min=1.0)
    delta = b[1] - a[1]
    return torch.stack((count, a[1] + delta * share, a[2] + b[2] + delta**2 * a[0] * share))


def pool(table: Tensor) -> Tensor:
    """Merge the states of many batches at once: (batches, n, 3) -> (n, 3), float64."""
    counts, means, squares = table.unbind(dim=-1)
    count = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / count.clamp(min=1.0)
    square = (squares + counts * (means - mean) ** 2).sum(dim=0)
    return torch.stack((count, mean, square), dim=-1)


def precision(table: Tensor) -> Tensor:
    """Relative half-width of the 95 % confidence interval of each std: (batches, n, 3) -> (n,).

    Pixels and channels of a batch are correlated, so each batch counts as one observation of the
    second moment about the common mean; its spread over batches gives the standard error, and
    Student's t the interval. Infinite for fewer than two batches.
    """
    counts, means, squares = table.unbind(dim=-1)
    _, mean, _ = pool(table).unbind(dim=-1)
    second = squares / counts.clamp(min=1.0) + (means - mean) ** 2
    n = len(table)
    if n < 2:
        return torch.full_like(mean, float("inf"))
    error = second.std(dim=0) / n**0.5
    half_width: Tensor = _student(n - 1) * error / (2.0 * second.mean(dim=0)).clamp(min=1e-300)
    return half_width


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t (Cornish-Fisher expansion; within 2 % from 4 degrees on)."""
    return 1.95996 + 2.37227 / freedom + 2.82250 / freedom**2
