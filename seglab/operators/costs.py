"""Which branches of a fusion are worth fusing: seconds of both ways, predicted from their shapes.

Both predictions are sums of counts times what one of them costs. The costs were fitted to measured
forward and backward passes by `benchmarks/fusion_costs.py`, which prints these tables; only
their ratios matter here. Where nothing was measured (CUDA, so far) the plain way is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seglab.operators.fused_conv import Geometry

Counts = dict[str, float]


@dataclass(frozen=True)
class Costs:
    """Nanoseconds for one of each count, forward and backward together.

    Attributes:
        plain: counts of `count_plain`.
        fused: counts of `count_fused`.
        split: for one weight of the branches that are not fused, which lie apart from the others'
            then.
        overhead: of one call of the operator, whatever it is given, less that of the plain way.
    """

    plain: Counts
    fused: Counts
    split: float
    overhead: float


ONE_THREAD = {
    torch.float32: Costs(
        plain={"products": 0.0302, "resized": 7.18, "weights": 1.21},
        fused={"products": 0.062, "tapped": 0.284, "between": 2.86, "out": 3.71, "weights": 3.74,
               "steps": 4110.0},
        split=2.3,
        overhead=290_000.0,
    ),
    torch.bfloat16: Costs(
        plain={"products": 0.0175, "resized": 7.61, "weights": 0.0},
        fused={"products": 0.0622, "tapped": 0.468, "between": 3.46, "out": 3.23, "weights": 4.51,
               "steps": 4730.0},
        split=2.3,
        overhead=210_000.0,
    ),
}  # fmt: skip
TWO_THREADS = {  # what does not shrink with threads: copies of weights, and one step after another
    torch.float32: Costs(
        plain={"products": 0.0155, "resized": 4.02, "weights": 0.55},
        fused={"products": 0.0348, "tapped": 0.0, "between": 2.82, "out": 2.15, "weights": 2.8,
               "steps": 4670.0},
        split=1.3,
        overhead=410_000.0,
    ),
    torch.bfloat16: Costs(
        plain={"products": 0.00904, "resized": 3.78, "weights": 0.0},
        fused={"products": 0.032, "tapped": 0.0, "between": 2.99, "out": 1.62, "weights": 2.91,
               "steps": 5220.0},
        split=1.3,
        overhead=310_000.0,
    ),
}  # fmt: skip
"""Of a processor with AVX512-BF16. The fused way multiplies bfloat16 in float32."""


def find_costs(device: torch.device, dtype: torch.dtype) -> Costs | None:
    """Costs measured for a device and a dtype; those of two threads stand for any more.

    >>> find_costs(torch.device("cuda"), torch.float32) is None
    True
    """
    if device.type != "cpu":
        return None
    table = ONE_THREAD if _n_threads() == 1 else TWO_THREADS
    return table.get(torch.float32 if dtype == torch.float64 else dtype)


# torch.compile cannot look into it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _n_threads() -> int:
    return torch.get_num_threads()


def count_plain(shape: Sequence[int], n_out: int, geometry: Geometry) -> Counts:
    """Work of resizing a branch of `shape` (B, C, h, w) and convolving it to `n_out` channels."""
    n_images, channels = shape[:2]
    height, width = geometry.size
    out_height, out_width = geometry.out_size
    taps = geometry.rows.kernel * geometry.columns.kernel
    return {
        "products": float(n_images * out_height * out_width * taps * channels * n_out),
        "resized": float(n_images * height * width * channels),
        "weights": float(taps * channels * n_out),
    }


def count_fused(shape: Sequence[int], n_out: int, geometry: Geometry) -> Counts:
    """Work of the fused way, see `fused_conv.py`: products, then resampling along each axis."""
    n_images, channels, height, width = shape
    out_height, out_width = geometry.out_size
    kernel = geometry.columns.kernel
    taps = geometry.rows.kernel * kernel
    return {
        "products": float(n_images * height * width * taps * channels * n_out),
        "tapped": float(n_images * height * width * taps * n_out),
        "between": float(n_images * out_height * width * kernel * n_out),
        "out": float(n_images * out_height * out_width * n_out),
        "weights": float(taps * channels * n_out),
        "steps": float(n_images * out_height),
    }


def predict(counts: Counts, costs: Counts) -> float:
    """Nanoseconds that `counts` take."""
    return sum(number * costs[name] for name, number in counts.items())


def choose_fused(
    features: Sequence[Tensor], n_out: int, geometry: Geometry, force: str | None
) -> tuple[bool, ...]:
    """Say for each branch whether to fuse it.

    Args:
        features: branches (B, C_i, h_i, w_i) of one dtype on one device.
        n_out: channels of the result.
        geometry: size, convolution and resampling.
        force: "fused" for all branches that would have to be resized, "plain" for none, or None to
            go by predicted time.
    """
    resized = [tuple(x.shape[-2:]) != geometry.size for x in features]
    costs = find_costs(features[0].device, features[0].dtype)
    if force == "plain" or (force is None and costs is None):
        return tuple(False for _ in features)
    if force == "fused" or costs is None:
        return tuple(resized)
    gains = [
        predict(count_plain(x.shape, n_out, geometry), costs.plain)
        - predict(count_fused(x.shape, n_out, geometry), costs.fused)
        if differs
        else 0.0
        for x, differs in zip(features, resized, strict=True)
    ]
    taps = geometry.rows.kernel * geometry.columns.kernel
    rest = sum(x.shape[1] for x, gain in zip(features, gains, strict=True) if gain <= 0)
    price = costs.overhead + costs.split * taps * rest * n_out
    worth_it = sum(gain for gain in gains if gain > 0) > price
    return tuple(worth_it and gain > 0 for gain in gains)
