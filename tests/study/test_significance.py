"""Intervals and tests against other implementations, enumeration and hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from seglab.study.intervals import bootstrap_interval, spread_interval, t_interval
from seglab.study.significance import equivalence_test, holm, sign_flip_test, t_test

RANDOM = np.random.default_rng(4)
TREATMENT, CONTROL = RANDOM.normal(60.3, 0.5, (2, 9))
DIFFERENCES = TREATMENT - CONTROL


def test_t_test_is_the_paired_one_of_scipy() -> None:
    expected = stats.ttest_rel(TREATMENT, CONTROL)
    assert t_test(DIFFERENCES) == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.9)
    np.testing.assert_allclose(t_interval(DIFFERENCES, 0.9), (interval.low, interval.high))


@pytest.mark.parametrize("n", [2, 5, 9])
def test_sign_flips_are_all_that_there_are(n: int) -> None:
    values = DIFFERENCES[:n] + 0.3
    sums = [abs(np.dot(signs, values)) for signs in itertools.product((-1, 1), repeat=n)]
    as_far = np.mean(np.array(sums) >= abs(values.sum()) - 1e-12)
    assert sign_flip_test(values) == pytest.approx(as_far, abs=1e-12)


def test_many_seeds_are_flipped_at_random_near_exact() -> None:
    values = RANDOM.normal(0.2, 0.5, 16)
    flips = np.array([*itertools.product((-1, 1), repeat=16)]) @ values
    exact = np.mean(np.abs(flips) >= abs(values.sum()) - 1e-12)
    assert sign_flip_test(values) == pytest.approx(exact, abs=4 * np.sqrt(exact / 9999) + 2e-4)
    assert sign_flip_test(values) == sign_flip_test(values)


def test_holm_agrees_with_an_example_by_hand() -> None:
    # 0.005 x 4, 0.01 x 3, then 0.03 x 2, and 0.04 x 1 raised to what came before.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.9, 0.6]), [1, 1])
    assert holm([]).size == 0


def test_holm_counts_no_test_that_was_not_made() -> None:
    found = holm([[np.nan, 0.02, 0.04], [0.02, 0.04, np.nan]])
    np.testing.assert_allclose(found, [[np.nan, 0.04, 0.04], [0.04, 0.04, np.nan]])


@pytest.mark.parametrize("margin", [0.1, 0.5, 2.0])
def test_equivalence_is_two_one_sided_tests(margin: float) -> None:
    mean, error = DIFFERENCES.mean(), DIFFERENCES.std(ddof=1) / 3
    from_below = stats.t.sf((mean + margin) / error, 8)
    from_above = stats.t.cdf((mean - margin) / error, 8)
    found = equivalence_test(DIFFERENCES, margin)
    assert found == pytest.approx(max(from_below, from_above), rel=1e-9)
    low, high = t_interval(DIFFERENCES, 0.9)
    assert (found <= 0.05) == (-margin <= low and high <= margin)


def test_bootstrap_is_that_of_drawn_seeds() -> None:
    few = DIFFERENCES[:6]
    low, high, method = bootstrap_interval(few)
    every = np.array([*itertools.product(few, repeat=6)]).mean(1)
    assert method == "percentile"
    np.testing.assert_allclose((low, high), np.quantile(every, [0.025, 0.975]), atol=0.02)
    assert bootstrap_interval(DIFFERENCES)[2] == "BCa"
    assert bootstrap_interval(few) == bootstrap_interval(few)


def test_spread_is_known_as_well_as_chi_square_says() -> None:
    low, high = spread_interval(DIFFERENCES)
    found = 8 * DIFFERENCES.var(ddof=1) / np.square([high, low])
    np.testing.assert_allclose(stats.chi2.cdf(found, 8), [0.025, 0.975])


@pytest.mark.parametrize("values", [[], [0.3]])
def test_fewer_than_two_seeds_have_no_test(values: list[float]) -> None:
    found = [t_test(values), sign_flip_test(values), equivalence_test(values, 0.2)]
    found += [*t_interval(values), *bootstrap_interval(values)[:2]]
    assert np.isnan(found).all()


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_differences_without_spread_have_no_t_test(value: float) -> None:
    same = [value + 1e-13, value, value]
    assert np.isnan(
        [t_test(same), equivalence_test(same, 0.2), *bootstrap_interval([value] * 3)[:2]]
    ).all()
    both = t_test([same, [0.1, 0.2, 0.4]])
    assert np.isnan(both[0])
    assert both[1] == pytest.approx(stats.ttest_1samp([0.1, 0.2, 0.4], 0).pvalue)
