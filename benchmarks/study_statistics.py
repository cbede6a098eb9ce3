"""Simulated studies: how often the statistics of `seglab study` say what they should.

    python benchmarks/study_statistics.py [--n_studies 1000] [--n_seeds 8]

Every study has a control and four arms. A seed adds the same to all of them, and each run a normal
deviation of its own, such that paired differences have a deviation of 0.3 points. Beside each rate
stands what theory says, and the range in which 95 of 100 such simulations would find it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats

from seglab.study.comparisons import ALPHA, compare, correct
from seglab.study.intervals import bootstrap_interval, spread_interval, t_interval
from seglab.study.pairs import Pairs
from seglab.study.power import seeds_needed, smallest_effect
from seglab.study.significance import equivalence_test, holm, sign_flip_test, t_test
from seglab.study.verdicts import verdict

SPREAD = 0.3
N_ARMS = 4
MARGIN = 0.2


@dataclass(frozen=True)
class Rate:
    """How often something was found; `expected` is None where theory names no number.

    `at_most` says that `expected` is a bound and not a rate.
    """

    name: str
    n_found: int
    n_studies: int
    expected: float | None = None
    at_most: bool = False

    def range(self, confidence: float = 0.95) -> tuple[float, float]:
        """Rates that `expected` gives in so many studies; from 0 where it is a bound."""
        assert self.expected is not None
        low, high = stats.binom.interval(confidence, self.n_studies, self.expected)
        return (0.0 if self.at_most else low / self.n_studies), high / self.n_studies

    def fits(self, confidence: float = 0.999) -> bool:
        """Whether the rate is what theory says, as far as so many studies can tell."""
        low, high = self.range(confidence)
        return low <= self.n_found / self.n_studies <= high


def draw_differences(
    n_studies: int, n_seeds: int, effect: float = 0.0, n_arms: int = N_ARMS, seed: int = 0
) -> np.ndarray:
    """Paired differences of all arms from the control, (studies, arms, seeds)."""
    random = np.random.default_rng(seed)
    of_seeds = random.normal(70, 1.0, (n_studies, 1, n_seeds))
    own = random.normal(0, SPREAD / np.sqrt(2), (n_studies, n_arms + 1, n_seeds))
    values = of_seeds + own
    return values[:, 1:] + effect - values[:, :1]


def null_rates(n_studies: int, n_seeds: int) -> Iterator[Rate]:
    """False positives where no arm differs."""
    differences = draw_differences(n_studies, n_seeds)
    by_t, by_signs = t_test(differences), sign_flip_test(differences)
    # Exact tests reach only multiples of two flips in 2^n.
    reachable = np.floor(ALPHA * 2.0 ** (n_seeds - 1)) / 2.0 ** (n_seeds - 1)
    n = n_studies
    yield Rate("no difference: t test, one arm, p <= 0.05", _n(by_t[:, 0] <= ALPHA), n, ALPHA)
    yield Rate(
        "no difference: sign flips, one arm, p <= 0.05", _n(by_signs[:, 0] <= ALPHA), n, reachable
    )
    for name, p in (("t test", by_t), ("sign flips", by_signs)):
        any_arm = (holm(p) <= ALPHA).any(1)
        yield Rate(f"no difference: any of four arms, {name}, Holm", _n(any_arm), n, ALPHA, True)
    yield Rate("no difference: any of four arms, t test, uncorrected", _n((by_t <= 0.05).any(1)), n)


def power_rates(n_studies: int, n_seeds: int) -> Iterator[Rate]:
    """Planted differences that are found."""
    shown = smallest_effect(SPREAD, n_seeds)
    planted = (
        (MARGIN, n_seeds, "planted 0.2 points"),
        (shown, n_seeds, f"planted {shown:.3f} points (smallest_effect)"),
        (MARGIN, seeds_needed(MARGIN, SPREAD), "planted 0.2 points (seeds_needed)"),
    )
    for seed, (effect, n, text) in enumerate(planted, start=100):
        p = t_test(draw_differences(n_studies, n, effect, 1, seed=seed)[:, 0])
        yield Rate(f"{text}, {n} seeds: t test", _n(p <= ALPHA), n_studies, stated(effect, n))


def stated(effect: float, n_seeds: int) -> float:
    """Power of the t test by the noncentral t, from its definition."""
    shift, limit = effect / SPREAD * n_seeds**0.5, stats.t.ppf(0.975, n_seeds - 1)
    return float(1 - stats.nct.cdf(limit, n_seeds - 1, shift))


def equivalence_rates(n_studies: int) -> Iterator[Rate]:
    """TOST at the margin's edge, where it is wrong, and at zero, where it is right."""
    for n_seeds in (8, 40):
        for effect, expected in ((MARGIN, ALPHA), (0.0, None)):
            differences = draw_differences(n_studies, n_seeds, effect, 1, seed=n_seeds)[:, 0]
            found = _n(equivalence_test(differences, MARGIN) <= ALPHA)
            name = f"true difference {effect:g}: equivalent within 0.2, {n_seeds} seeds"
            yield Rate(name, found, n_studies, expected, expected is not None)


def coverage_rates(n_studies: int) -> Iterator[Rate]:
    """95 % intervals that hold the truth."""
    for n_seeds in (5, 8, 20):
        values = draw_differences(n_studies, n_seeds, 0.1, 1, seed=n_seeds)[:, 0]
        low, high = t_interval(values)
        name = f"95 % interval holds the mean, {n_seeds} seeds"
        yield Rate(f"{name}: t", _n((low <= 0.1) & (high >= 0.1)), n_studies, 0.95)
        low, high, method = bootstrap_interval(values, n_draws=999)
        yield Rate(f"{name}: bootstrap, {method}", _n((low <= 0.1) & (high >= 0.1)), n_studies)
    spreads = [spread_interval(v) for v in draw_differences(n_studies, 8, 0, 1)[:, 0]]
    held = _n([low <= SPREAD <= high for low, high in spreads])
    yield Rate("95 % interval holds the deviation, 8 seeds", held, n_studies, 0.95)


def verdict_rates(n_studies: int, n_seeds: int) -> Iterator[Rate]:
    """Sentences of whole analyses in which no arm differs."""
    primary = exploratory = 0
    for study in draw_differences(n_studies, n_seeds, seed=1):
        seeds = tuple(range(n_seeds))
        arms = [Pairs(f"arm {i}", "off", "final", seeds, (*d,), {}) for i, d in enumerate(study)]
        family = [compare(each, MARGIN, i == 0, None) for i, each in enumerate(arms)]
        wrong = [verdict(each).startswith(("better", "worse")) for each in correct(family)]
        primary += wrong[0]
        exploratory += any(wrong[1:])
    yield Rate("no difference: the primary verdict says better or worse", primary, n_studies, ALPHA)
    name = "no difference: any exploratory verdict says better or worse"
    yield Rate(name, exploratory, n_studies, ALPHA, True)


def _n(found: object) -> int:
    return int(np.count_nonzero(found))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--n_studies", type=int, default=1000)
    parser.add_argument("--n_seeds", type=int, default=8)
    options = parser.parse_args()
    n, seeds = options.n_studies, options.n_seeds
    print(f"{n} simulated studies, {seeds} seeds where no other number is named\n")
    print("| | expected | found | range |\n|---|--:|--:|--:|")
    rates = (
        *null_rates(n, seeds), *verdict_rates(n, seeds), *power_rates(n, seeds),
        *equivalence_rates(n), *coverage_rates(n),
    )  # fmt: skip
    for rate in rates:
        expected = within = "-"
        if rate.expected is not None:
            expected = f"{'at most ' if rate.at_most else ''}{100 * rate.expected:.1f} %"
            within = "{:.1f} to {:.1f} %".format(*(100 * end for end in rate.range()))
        print(f"| {rate.name} | {expected} | {100 * rate.n_found / n:.1f} % | {within} |")


if __name__ == "__main__":
    main()
