"""A thousand studies whose truth is known: how often the statistics say so."""

from __future__ import annotations

import numpy as np
import pytest
import study_statistics as simulated

from seglab.study.intervals import bootstrap_interval
from seglab.study.power import seeds_needed

N = 1000


def misfits(rates: object) -> list[str]:
    """Rates that one in a thousand such simulations would not give."""
    return [
        f"{rate.name}: {rate.n_found} of {rate.n_studies}, expected {rate.expected}"
        for rate in rates
        if rate.expected is not None and not rate.fits()
    ]


@pytest.mark.parametrize("n_seeds", [5, 8])
def test_no_difference_is_found_as_often_as_stated(n_seeds: int) -> None:
    assert misfits(simulated.null_rates(N, n_seeds)) == []


def test_uncorrected_arms_would_be_found_too_often() -> None:
    """The simulation can tell: without Holm's correction the same studies do not fit."""
    *_, uncorrected = simulated.null_rates(N, 8)
    bound = simulated.Rate("", uncorrected.n_found, N, 0.05, at_most=True)
    assert not bound.fits()


def test_planted_difference_is_found_with_the_stated_power() -> None:
    assert misfits(simulated.power_rates(N, 8)) == []


def test_seeds_needed_are_the_fewest_that_do() -> None:
    n = seeds_needed(0.2, simulated.SPREAD)
    assert simulated.stated(0.2, n - 1) < 0.8 <= simulated.stated(0.2, n)


def test_equivalence_is_rarely_claimed_at_the_margin() -> None:
    assert misfits(simulated.equivalence_rates(N)) == []


def test_intervals_hold_the_truth_as_often_as_stated() -> None:
    assert misfits(simulated.coverage_rates(N)) == []


def test_bootstrap_of_few_seeds_is_too_narrow_and_of_many_is_not() -> None:
    """Why Student's interval decides, and not the bootstrap."""

    def held(n_seeds: int) -> float:
        values = simulated.draw_differences(N, n_seeds, 0, 1, seed=n_seeds)[:, 0]
        low, high, _ = bootstrap_interval(values, n_draws=499)
        return float(np.mean((low <= 0) & (high >= 0)))

    assert held(8) < 0.91
    assert 0.91 < held(50) < 0.97


@pytest.mark.slow
def test_verdicts_of_equal_arms_are_rarely_better_or_worse() -> None:
    assert misfits(simulated.verdict_rates(N, 8)) == []
