"""Fit the costs in `seglab/operators/costs.py` to measured forward and backward passes.

    python benchmarks/fusion_costs.py [--dtype bfloat16] [--samples 150] [--threads 2]

Draws random shapes of one branch (channels first, which costs the fused way copies), times both
ways (alternating, medians of the wall clock; nothing else may run), and fits non-negative costs to
the relative errors. Then draws fusions of a branch that is fused with one that is not, and fits
what the prediction missed there. Prints the tables to paste, and how much time the predicted choice
loses to the better one on shapes that were not fitted.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.optimize import nnls

from seglab.models import FusionConv2d
from seglab.operators.costs import Counts, count_fused, count_plain
from seglab.operators.fuse import fuse
from seglab.operators.fused_conv import Geometry, resize_and_convolve
from seglab.operators.resampling import ConvAxis, Resampling

LARGEST = 1e9  # products of the plain way, to keep one pass below about 20 ms
Sample = tuple[Counts, Counts, float, float]  # both counts, both times in nanoseconds


def draw_shape(rng: random.Random) -> tuple[int, int, int, int, int, int]:
    """Images, channels, output channels, kernel, side of the branch and of the result."""
    while True:
        channels, n_out = (2 ** rng.randint(4, 9) for _ in range(2))
        kernel, side = rng.choice((1, 3, 3)), rng.randint(8, 128)
        low = rng.choice((1, 2, 6, side // 8, side // 4, side // 2, side // 2))
        n_images = rng.choice((1, 2, 4))
        if low and n_images * channels * n_out * (kernel * side) ** 2 < LARGEST:
            return n_images, channels, n_out, kernel, low, side


def measure(rng: random.Random, dtype: torch.dtype) -> Sample:
    """Time both ways on one random shape."""
    n_images, channels, n_out, kernel, low, side = draw_shape(rng)
    window = ConvAxis(kernel, padding=kernel // 2)
    geometry = Geometry((side, side), window, window, Resampling())
    shape = (n_images, channels, low, low)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(n_out, channels, kernel, kernel).to(dtype).requires_grad_()
    grad = torch.randn(n_images, n_out, side, side).to(dtype)
    ways: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: resize_and_convolve([x], [weight], None, geometry),
        lambda: fuse([x], [weight], None, geometry, direct=False),
    )
    plain, fused = time_both(ways, (x, weight), grad)
    return (
        count_plain(shape, n_out, geometry),
        count_fused(shape, n_out, geometry),
        plain,
        fused,
    )


def time_both(
    ways: tuple[Callable[[], torch.Tensor], ...],
    leaves: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
) -> list[float]:
    """Median nanoseconds of forward and backward pass, each way in turn."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(5):
        for way, found in zip(ways, times, strict=True):
            start = time.perf_counter_ns()
            torch.autograd.grad(way(), leaves, grad)
            found.append(time.perf_counter_ns() - start)
    return [statistics.median(found) for found in times]


def fit_split(rng: random.Random, dtype: torch.dtype, costs: tuple[Counts, Counts]) -> Counts:
    """What fusing one of two branches costs beyond what its shape says: per other weight, and once.

    `costs` are those of the plain and of the fused way.
    """
    counts, missed, times = [], [], []
    for _ in range(60):
        n_images, channels, n_out, kernel, low, side = draw_shape(rng)
        others = 2 ** rng.randint(5, 11)
        conv = FusionConv2d(others + channels, n_out, kernel, padding=kernel // 2, bias=False)
        conv = conv.to(dtype)
        shapes = [(others, min(side, 48)), (channels, low)]
        branches = [torch.randn(n_images, c, s, s).to(dtype).requires_grad_() for c, s in shapes]
        with torch.no_grad():
            grad = torch.ones_like(conv(branches, force="plain"))
        ways = tuple(partial(conv, branches, force=way) for way in ("plain", "fused"))
        plain, fused = time_both(ways, (*branches, conv.weight), grad)
        window = ConvAxis(kernel, padding=kernel // 2)
        geometry = Geometry((shapes[0][1],) * 2, window, window, Resampling())
        shape = tuple(branches[1].shape)
        gain = predict(count_plain(shape, n_out, geometry), costs[0])
        gain -= predict(count_fused(shape, n_out, geometry), costs[1])
        counts.append({"split": float(kernel**2 * others * n_out)})
        missed.append(gain - (plain - fused))
        times.append(fused)
    table = np.array([[count["split"], 1.0] for count in counts]) / np.array(times)[:, None]
    scale = table.max(axis=0)
    found, _ = nnls(table / scale, np.array(missed) / np.array(times))
    return dict(zip(("split", "overhead"), found / scale, strict=True))


def fit(counts: list[Counts], times: list[float]) -> Counts:
    """Non-negative costs, and `call` for what every call costs, of least relative error."""
    names = [*counts[0], "call"]
    table = np.array([[*count.values(), 1.0] for count in counts]) / np.array(times)[:, None]
    scale = table.max(axis=0)
    costs, _ = nnls(table / scale, np.ones(len(times)))
    return dict(zip(names, costs / scale, strict=True))


def predict(count: Counts, costs: Counts) -> float:
    """Nanoseconds of one call."""
    return costs["call"] + sum(number * costs[name] for name, number in count.items())


def main() -> None:
    """Measure, fit on two thirds, judge on the rest."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rng = random.Random(0)
    torch.set_num_threads(options.threads)
    samples = [measure(rng, getattr(torch, options.dtype)) for _ in range(options.samples)]
    fitted, unseen = samples[: 2 * len(samples) // 3], samples[2 * len(samples) // 3 :]
    plain = fit([s[0] for s in fitted], [s[2] for s in fitted])
    fused = fit([s[1] for s in fitted], [s[3] for s in fitted])
    for title, costs in (("plain", plain), ("fused", fused)):
        print(title, {name: float(f"{cost:.3g}") for name, cost in costs.items()})
    split = fit_split(rng, getattr(torch, options.dtype), (plain, fused))
    print("beside others", {name: float(f"{cost:.3g}") for name, cost in split.items()})
    chosen = best = 0.0
    spread = []
    for count_p, count_f, time_p, time_f in unseen:
        estimates = predict(count_p, plain), predict(count_f, fused)
        chosen += time_f if estimates[1] < estimates[0] else time_p
        best += min(time_p, time_f)
        spread += [abs(math.log(e / t)) for e, t in zip(estimates, (time_p, time_f), strict=True)]
    always = sum(s[2] for s in unseen), sum(s[3] for s in unseen)
    print(
        f"unseen shapes: typical error of a prediction x{math.exp(statistics.median(spread)):.2f}"
    )
    print(
        f"time over the best choice: predicted {chosen / best:.3f}, "
        f"always plain {always[0] / best:.3f}, always fused {always[1] / best:.3f}"
    )


if __name__ == "__main__":
    main()
