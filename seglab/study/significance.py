"""Tests of paired differences, and corrections for several. Differences are (..., n seeds).

All are two-sided and give NaN where they cannot be made: for fewer than two seeds, and the t tests
for differences without any spread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
N_DRAWS = 9999
NO_SPREAD = 1e-9
"""Points: what rounding alone makes of equal differences."""


def t_test(differences: ArrayLike) -> Floats:
    """P-value of the paired t test of no difference."""
    values = _testable(differences)
    found: Floats = stats.ttest_1samp(values, 0, axis=-1).pvalue if values.size else _none(values)
    return found


def sign_flip_test(differences: ArrayLike, n_draws: int = N_DRAWS, seed: int = 0) -> Floats:
    """P-value of the sign-flip permutation test: were the arms the same, each sign is a coin's.

    Exact up to 13 seeds, where all 2^n flips are tried; random flips beyond. With n seeds no
    p-value is below 2^(1-n).
    """
    values = np.asarray(differences, float)
    if values.shape[-1] < 2:
        return _none(values)
    found: Floats = stats.permutation_test(
        (values,), _mean, permutation_type="samples", vectorized=True, axis=-1,
        n_resamples=n_draws, batch=max(1, 10**7 // values.size),
        random_state=np.random.default_rng(seed),
    ).pvalue  # fmt: skip
    return found


def equivalence_test(differences: ArrayLike, margin: float) -> Floats:
    """P-value of two one-sided t tests (TOST, Schuirmann 1987) of |mean| >= margin."""
    values = _testable(differences)
    if not values.size:
        return _none(values)
    above = stats.ttest_1samp(values, -margin, axis=-1, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, axis=-1, alternative="less").pvalue
    found: Floats = np.maximum(above, below)
    return found


def holm(p_values: ArrayLike) -> Floats:
    """P-values corrected for how many there are, by Holm's step-down method (1979).

    Compared with alpha, they keep the chance of any false positive below alpha. NaN stays NaN and
    counts as no test.

    Args:
        p_values: Of a family of tests, (..., m).

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, -1)  # NaN last
    left = (~np.isnan(p)).sum(-1, keepdims=True) - np.arange(p.shape[-1])
    steps = np.maximum.accumulate(np.take_along_axis(p, order, -1) * left, -1)
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, np.minimum(steps, 1), -1)
    return corrected


def _testable(differences: ArrayLike) -> Floats:
    """Differences, NaN where they have no spread; empty for fewer than two seeds."""
    values = np.asarray(differences, float)
    if values.shape[-1] < 2:
        return values[..., :0]
    flat = np.ptp(values, -1, keepdims=True) <= NO_SPREAD
    return np.where(flat, np.nan, values)


def _none(values: Floats) -> Floats:
    return np.full(values.shape[:-1], np.nan)


def _mean(values: Floats, axis: int) -> Any:
    return values.mean(axis)
