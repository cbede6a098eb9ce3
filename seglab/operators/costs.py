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
        overhead: of one call of the operator, whatever it is given, less that of the plain way.
    """

    plain: Counts
    fused: Counts
    overhead: float


FLOAT32_CPU = Costs(
    plain={"products": 0.0287, "resized": 6.85, "weights": 0.856},
    fused={"products": 0.0535, "tapped": 0.0304, "between": 3.08, "out": 3.58, "weights": 2.95,
           "steps": 2590.0},
    overhead=216_000.0,
)  # fmt: skip
BFLOAT16_CPU = Costs(  # a processor with AVX512-BF16; the fused way multiplies in float32
    plain={"products": 0.0163, "resized": 6.95, "weights": 0.0},
    fused={"products": 0.05, "tapped": 0.733, "between": 2.84, "out": 2.53, "weights": 3.68,
           "steps": 5340.0},
    overhead=23_000.0,
)  # fmt: skip
COSTS = {
    ("cpu", torch.float32): FLOAT32_CPU,
    ("cpu", torch.float64): FLOAT32_CPU,
    ("cpu", torch.bfloat16): BFLOAT16_CPU,
}


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
    costs = COSTS.get((features[0].device.type, features[0].dtype))
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
    if sum(gain for gain in gains if gain > 0) <= costs.overhead:
        return tuple(False for _ in features)
    return tuple(gain > 0 for gain in gains)
