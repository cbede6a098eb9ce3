"""How many paired runs show a difference: the power of the paired t test, by the noncentral t."""

from __future__ import annotations

import math

from scipy import optimize, stats


def smallest_effect(spread: float, n_seeds: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest mean difference that so many pairs show with this power.

    Args:
        spread: Standard deviation of the paired differences over seeds.
        n_seeds: Number of pairs.
        alpha: How often the two-sided t test may find a difference that is not there.
        power: How often it finds the one that is there.

    Returns:
        In the unit of `spread`; infinite for fewer than two pairs.

    >>> round(smallest_effect(0.3, 20), 3)
    0.198
    """
    if n_seeds < 2:
        return math.inf
    if spread == 0:
        return 0.0
    high = spread
    while _power(high / spread, n_seeds, alpha) < power:
        high *= 2
    return float(
        optimize.brentq(lambda e: _power(e / spread, n_seeds, alpha) - power, high / 1e6, high)
    )


def seeds_needed(effect: float, spread: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """The smallest number of pairs that shows a mean difference with this power.

    Args:
        effect: The difference, in the unit of `spread`.
        spread: Standard deviation of the paired differences over seeds.
        alpha: How often the two-sided t test may find a difference that is not there.
        power: How often it finds the one that is there.

    >>> seeds_needed(0.2, 0.3)
    20
    """
    if effect == 0:
        raise ValueError("effect is 0: no number of seeds shows a difference of nothing")
    if spread == 0:
        return 2
    low, high = 1, 2  # the power grows with the number of pairs
    while _power(abs(effect) / spread, high, alpha) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = _power(abs(effect) / spread, middle, alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def _power(standardized: float, n_seeds: int, alpha: float) -> float:
    limit, shift = stats.t.ppf(1 - alpha / 2, n_seeds - 1), standardized * math.sqrt(n_seeds)
    # Below 1e-6 the other tail is left to scipy's rounding, which gives NaN for the smallest.
    below = stats.nct.cdf(-limit, n_seeds - 1, shift)
    return float(stats.nct.sf(limit, n_seeds - 1, shift) + (below if below > 0 else 0))
