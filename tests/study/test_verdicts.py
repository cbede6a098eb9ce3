"""Sentences follow from the tests: each case is built so that its answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from seglab.study.comparisons import Comparison, compare, compare_classes, correct
from seglab.study.pairs import Pairs
from seglab.study.verdicts import verdict

NOISE = np.array([-1.0, 1, -1, 1, -1, 1, -1, 1])  # mean 0, deviation 1.069


def comparison(values: object, primary: bool = True, margin: float = 0.2) -> Comparison:
    differences = tuple(float(v) for v in np.asarray(values))
    seeds = tuple(range(len(differences)))
    return compare(Pairs("fold", "off", "final", seeds, differences, {}), margin, primary, None)


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ([], "nothing to compare"),
        ([0.4], "one pair, +0.40 points"),
        ([0.0] * 4, "identical in all 4 pairs"),
        ([0.3] * 4, "+0.30 points in all 4 pairs"),
        (1 + 0.1 * NOISE, "better by at least 0.91 points, by 1.00 on average"),
        (-1 + 0.1 * NOISE, "worse by at least 0.91 points"),
        (0.1 + 0.01 * NOISE, "better by at least 0.09 points, by 0.10 on average, yet by less"),
        (0.1 * NOISE, "equivalent within 0.2 points"),
        (NOISE, "not decided: 227 seeds would be needed to show 0.2 points (100 to 931,"),
        (0.11 + 0.155 * NOISE, "not decided: neither zero nor 0.2 points is ruled out"),
    ],
)
def test_sentence_says_what_the_tests_say(values: object, start: str) -> None:
    assert verdict(comparison(values)).startswith(start)


def test_least_difference_is_the_nearer_end_of_the_interval() -> None:
    values = 1 + 0.3 * NOISE
    low = stats.ttest_1samp(values, 0).confidence_interval().low
    assert f"at least {low:.2f} points" in verdict(comparison(values))


def test_few_seeds_say_what_signs_cannot_show() -> None:
    sentence = verdict(comparison([1.0, 1.1, 0.9]))
    assert sentence.startswith("better by at least 0.75")
    assert sentence.endswith("3 seeds are too few for the sign-flip test to say so too")


def test_disagreement_of_the_tests_is_told() -> None:
    # One seed far out: the t test sees noise, though seven of eight signs agree and are large.
    values = [0.3, 0.31, 0.29, 0.3, 0.32, 0.28, 0.3, 3.0]
    found = comparison(values)
    assert found.tests.t > 0.05
    assert found.tests.sign_flip == pytest.approx(2 / 256)
    assert verdict(found).endswith("the sign-flip test says otherwise (p = 0.008)")


def test_exploratory_arms_are_corrected_and_the_primary_is_not() -> None:
    edge = 0.85 * NOISE.std(ddof=1) + NOISE  # p of about 0.04
    family = correct([comparison(edge), *(comparison(edge, False) for _ in range(3))])
    primary, *others = (verdict(each) for each in family)
    assert primary.startswith("better by at least")
    assert {v.partition(" comparisons")[0] for v in others} == {
        "not decided: a difference before, none after correction for 4"
    }
    raw = stats.ttest_1samp(edge, 0).pvalue
    assert [each.corrected.t for each in family] == pytest.approx([4 * raw] * 4)


def test_comparison_without_a_test_is_not_counted() -> None:
    family = correct([comparison(1 + NOISE), comparison([0.3]), comparison([])])
    assert family[0].corrected == family[0].tests
    assert {each.n_family for each in family} == {1}


def test_class_that_is_absent_in_some_runs_is_compared_in_the_others() -> None:
    differences = {"road": [1.0, 1.2, 1.1], "car": [0.5], "boat": [], "sky": [0.1, -0.1, 0.0]}
    road, car, boat, sky = compare_classes(differences, None)
    raw = stats.ttest_1samp(differences["road"], 0)
    assert road.p == pytest.approx(2 * raw.pvalue)
    assert road.t_interval == pytest.approx(tuple(raw.confidence_interval()))
    assert (car.n_pairs, car.mean, car.t_interval) == (1, 0.5, None)
    assert math.isnan(boat.mean)
    assert sky.p == pytest.approx(1)
