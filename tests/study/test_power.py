"""Power of the paired t-test against published tables and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from seglab.study.power import power_of, seeds_needed, smallest_effect


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_equal_published_tables(effect: float, n: int) -> None:
    # G*Power 3.1, t tests, two dependent means, two-sided, alpha 0.05, power 0.8.
    assert seeds_needed(effect, 1.0) == n
    assert seeds_needed(-3 * effect, 3.0) == n


@pytest.mark.parametrize("n", [2, 3, 8, 30])
def test_simulated_studies_show_the_smallest_effect(n: int) -> None:
    effect = smallest_effect(0.4, n)
    draws = np.random.default_rng(n).normal(effect, 0.4, (40_000, n))
    statistic = draws.mean(1) / draws.std(1, ddof=1) * np.sqrt(n)
    critical = {2: 12.7062, 3: 4.3027, 8: 2.3646, 30: 2.0452}[n]  # Student's table, 97.5 %
    assert np.mean(np.abs(statistic) > critical) == pytest.approx(0.8, abs=0.01)


def test_power_without_effect_is_alpha() -> None:
    assert power_of(0.0, 1.0, 12, alpha=0.03) == pytest.approx(0.03, abs=1e-9)


def test_power_of_huge_effects_is_one() -> None:
    assert power_of(1e4, 1.0, 8) == pytest.approx(1.0)
    assert seeds_needed(1e6, 1.0) == 2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: smallest_effect(0.5, 1), "two at least"),
        (lambda: smallest_effect(0.0, 8), "spread is 0.0"),
        (lambda: smallest_effect(float("nan"), 8), "spread is nan"),
        (lambda: smallest_effect(0.5, 8, power=1.0), "power is 1.0"),
        (lambda: seeds_needed(0.0, 1.0), "effect is 0.0"),
        (lambda: seeds_needed(1.0, 1.0, alpha=0.0), "alpha is 0.0"),
    ],
)
def test_impossible_questions_are_refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
