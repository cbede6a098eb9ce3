"""Moments against numpy-free oracles in exact or double arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scale_equalization import Moments
from scale_equalization.statistics import pool, precision


def test_moments_equal_the_population_formula():
    values = torch.randn(3, 5, 7, 11, dtype=torch.float64) * 3 + 2
    moments = Moments()
    for chunk in values.split([1, 2]):
        moments.update(chunk)
    assert moments.count == values.numel()
    assert moments.mean == pytest.approx(values.mean().item(), rel=1e-13)
    assert moments.variance == pytest.approx(values.var(correction=0).item(), rel=1e-13)
    assert moments.std == pytest.approx(values.std(correction=0).item(), rel=1e-13)


def test_moments_are_exact_on_small_integers():
    values = [1, 5, 2, 2, 9, -4]
    mean = Fraction(sum(values), len(values))
    m2 = sum((v - mean) ** 2 for v in values)
    moments = Moments().update(torch.tensor(values[:2])).update(torch.tensor(values[2:]))
    assert moments.mean == pytest.approx(float(mean), abs=1e-7)
    assert pytest.approx(float(m2), rel=1e-6) == moments.M2


def test_far_from_zero_nothing_cancels():
    noise = torch.randn(100_000, dtype=torch.float64)
    far = Moments().update(noise[:50_000] + 1e8).update(noise[50_000:] + 1e8)
    assert far.std == pytest.approx(noise.std(correction=0).item(), rel=1e-7)


def test_large_float32_tensor_is_summed_accurately():
    values = torch.randn(4, 64, 128, 128).relu()
    exact = values.double()
    moments = Moments().update(values)
    assert moments.mean == pytest.approx(exact.mean().item(), rel=1e-6)
    assert moments.std == pytest.approx(exact.std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_values_are_reduced_in_float32(dtype: torch.dtype):
    values = (torch.randn(64, 64) * 100).to(dtype)
    exact = values.double()
    assert Moments().update(values).std == pytest.approx(exact.std(correction=0).item(), rel=1e-6)


def test_merge_equals_update_with_everything():
    first, second = torch.randn(100, dtype=torch.float64), torch.randn(50, dtype=torch.float64) + 9
    merged = Moments().update(first).merge(Moments().update(second))
    whole = Moments().update(torch.cat([first, second]))
    assert merged.state.tolist() == pytest.approx(whole.state.tolist(), rel=1e-13)


def test_empty_tensors_and_moments_change_nothing():
    moments = Moments().update(torch.zeros(0, 3)).merge(Moments())
    assert (moments.count, moments.mean, moments.variance) == (0, 0.0, 0.0)


def test_pool_equals_merging_one_by_one():
    chunks = [torch.randn(n, dtype=torch.float64) + n for n in (3, 10, 50)]
    table = torch.stack([Moments().update(chunk).state for chunk in chunks])
    merged = Moments()
    for chunk in chunks:
        merged.update(chunk)
    assert pool(table).tolist() == pytest.approx(merged.state.tolist(), rel=1e-13)


def test_interval_covers_the_true_std_about_95_times_in_100():
    torch.manual_seed(0)
    covered, runs = 0, 400
    for _ in range(runs):
        # Batches with a scale of their own: within a batch values are not independent.
        scale = 1 + 0.1 * torch.randn(12, 1, dtype=torch.float64)
        values = torch.randn(12, 500, dtype=torch.float64) * scale
        table = torch.stack([Moments().update(batch).state for batch in values])[:, None]
        estimate = Moments.from_state(pool(table)[0]).std
        truth = (1 + 0.01) ** 0.5
        covered += abs(estimate / truth - 1) <= precision(table)[0].item()
    assert 0.91 <= covered / runs <= 0.98


@pytest.mark.parametrize(
    ("ratio", "align_corners", "expected"),
    [(2, False, 0.394296), (4, False, 0.434196), (8, False, 0.444472), (2, True, 0.446189)],
)
def test_upsampled_noise_shrinks_as_the_closed_form_says(
    ratio: int, align_corners: bool, expected: float
):
    torch.manual_seed(0)
    noise = torch.randn(4, 32, 128, 128) * 0.3408**0.5 + 0.3989
    up = F.interpolate(noise, scale_factor=ratio, mode="bilinear", align_corners=align_corners)
    assert Moments().update(up).variance / 0.3408 == pytest.approx(expected, abs=1.5e-3)


@pytest.mark.parametrize("n", [5, 6, 20])
def test_precision_is_the_half_width_of_students_interval(n):
    generator = np.random.default_rng(n)
    means, counts = generator.normal(size=n), np.full(n, 100.0)
    variances = generator.uniform(0.5, 2.0, size=n)
    table = torch.tensor(np.stack([counts, means, counts * variances], axis=1))[:, None]
    second = variances + (means - means.mean()) ** 2
    quantile = {5: 2.7764, 6: 2.5706, 20: 2.0930}[n]  # 97.5 %, n - 1 degrees of freedom
    expected = quantile * second.std(ddof=1) / n**0.5 / (2 * second.mean())
    assert precision(table).item() == pytest.approx(expected, rel=0.02)
