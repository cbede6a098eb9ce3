"""Confidence intervals of a mean over seeds. Differences are arrays (..., n seeds)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from seglab.study.significance import NO_SPREAD

Floats = NDArray[np.float64]
N_DRAWS = 9999
FEWEST_FOR_BCA = 8


def t_interval(differences: ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Student's interval of the mean; NaN for fewer than two seeds.

    >>> low, high = t_interval([0.1, 0.3, 0.2])
    >>> round(float(low), 3), round(float(high), 3)
    (-0.048, 0.448)
    """
    values = np.asarray(differences, float)
    n = values.shape[-1]
    if n < 2:
        nothing = np.full(values.shape[:-1], np.nan)
        return nothing, nothing
    error = values.std(-1, ddof=1) / np.sqrt(n)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * error
    return values.mean(-1) - half, values.mean(-1) + half


def bootstrap_interval(
    differences: ArrayLike, confidence: float = 0.95, n_draws: int = N_DRAWS, seed: int = 0
) -> tuple[Floats, Floats, str]:
    """Bootstrap interval of the mean: seeds are drawn again with replacement.

    Bias-corrected and accelerated (BCa, Efron 1987) from eight seeds on; its acceleration is
    itself estimated, and with fewer seeds the percentile interval holds the mean more often.

    Returns:
        Lower ends, upper ends, and "BCa" or "percentile"; NaN and "" for fewer than two seeds or
        no spread.
    """
    values = np.asarray(differences, float)
    n = values.shape[-1]
    if n < 2 or (np.ptp(values, -1) <= NO_SPREAD).any():
        nothing = np.full(values.shape[:-1], np.nan)
        return nothing, nothing, ""
    method = "BCa" if n >= FEWEST_FOR_BCA else "percentile"
    found = stats.bootstrap(
        (values,), _mean, vectorized=True, axis=-1, confidence_level=confidence, method=method,
        n_resamples=n_draws, batch=max(1, 10**7 // values.size),
        random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return found.low, found.high, method


def spread_interval(differences: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Chi-square interval of the standard deviation over seeds: how well a spread is known.

    >>> [round(end, 2) for end in spread_interval([0.1, 0.3, 0.2])]
    [0.05, 0.63]
    """
    values = np.asarray(differences, float)
    freedom = values.shape[-1] - 1
    ends = stats.chi2.ppf([(1 + confidence) / 2, (1 - confidence) / 2], freedom)
    low, high = values.std(ddof=1) * np.sqrt(freedom / ends)
    return float(low), float(high)


def _mean(values: Floats, axis: int) -> Any:
    return values.mean(axis)
