"""Power of a paired t-test: what so many seeds can show, and how many seeds an effect needs.

Of n paired differences with mean e and deviation s, the test's statistic follows the noncentral t
distribution with n - 1 degrees of freedom and noncentrality e / s * sqrt(n).
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.stats import nct, t


def power_of(effect: float, spread: float, n_seeds: int, alpha: float = 0.05) -> float:
    """Probability that the two-sided paired t-test shows an effect.

    Args:
        effect: Mean difference between two arms, in any unit.
        spread: Standard deviation of the differences over seeds, in the same unit.
        n_seeds: Pairs.
        alpha: Level of the test.

    >>> round(power_of(1.0, 1.0, 10), 3)
    0.803
    """
    _require(spread, n_seeds, alpha)
    n_free = n_seeds - 1
    border = t.isf(alpha / 2, n_free)
    shift = abs(effect) / spread * math.sqrt(n_seeds)
    # The far tail is below 1e-300 where scipy cannot tell it.
    far = nct.cdf(-border, n_free, shift)
    return float(nct.sf(border, n_free, shift) + (0.0 if math.isnan(far) else far))


def smallest_effect(spread: float, n_seeds: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest effect that a study shows with this probability, in the unit of `spread`.

    Args:
        spread: Standard deviation of the paired differences over seeds.
        n_seeds: Pairs, two at least.
        alpha: Level of the two-sided test.
        power: Probability to show it.

    Raises:
        ValueError: Fewer than two seeds, or a number that is no probability or spread.

    >>> round(smallest_effect(0.5, 8), 3)
    0.578
    """
    _require(spread, n_seeds, alpha)
    if not alpha < power < 1:
        raise ValueError(f"power is {power}: give a probability between alpha ({alpha}) and 1")
    high = 1.0
    while power_of(high, 1.0, n_seeds, alpha) < power:
        high *= 2
    return float(spread * brentq(lambda e: power_of(e, 1.0, n_seeds, alpha) - power, 0, high))


def seeds_needed(effect: float, spread: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """The fewest seeds with which an effect is shown with this probability.

    Args:
        effect: Mean difference, not 0.
        spread: Standard deviation of the paired differences, in the same unit.
        alpha: Level of the two-sided test.
        power: Probability to show it.

    Raises:
        ValueError: No effect, or a number that is no probability or spread.

    >>> seeds_needed(0.2, 0.4)
    34
    """
    _require(spread, 2, alpha)
    if not effect or not math.isfinite(effect):
        raise ValueError(f"effect is {effect}: no number of seeds shows it")
    low, high = 1, 2
    while power_of(effect, spread, high, alpha) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if power_of(effect, spread, middle, alpha) < power:
            low = middle
        else:
            high = middle
    return high


def _require(spread: float, n_seeds: int, alpha: float) -> None:
    if n_seeds < 2:
        raise ValueError(f"{n_seeds} seed(s): a spread over seeds takes two at least")
    if not (spread > 0 and math.isfinite(spread)):
        raise ValueError(f"spread is {spread}: give the deviation of paired differences, above 0")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}: give a probability between 0 and 1")
