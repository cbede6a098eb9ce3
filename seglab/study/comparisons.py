"""Everything that is computed about one comparison of two arms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from seglab.study.image_draws import ImageIntervals
from seglab.study.intervals import Floats, bootstrap_interval, spread_interval, t_interval
from seglab.study.pairs import Pairs
from seglab.study.power import seeds_needed, smallest_effect
from seglab.study.significance import (
    NO_SPREAD,
    equivalence_test,
    holm,
    sign_flip_test,
    t_test,
)

Ends = tuple[float, float]
ALPHA = 0.05


@dataclass(frozen=True)
class PValues:
    """P-values; NaN where a test cannot be made.

    Attributes:
        t: Paired t test of no difference.
        sign_flip: Permutation test of no difference.
        equivalence: TOST of a difference of the margin or more.
    """

    t: float
    sign_flip: float
    equivalence: float


@dataclass(frozen=True)
class Comparison:
    """Differences treatment - control in points of mIoU.

    Attributes:
        pairs: What is compared, and the differences.
        primary: The one comparison that the plan names; all others explore.
        margin: Differences below it do not matter.
        mean: NaN without a pair.
        spread: Standard deviation over seeds; NaN for fewer than two pairs.
        t_interval: Of the mean, 95 %; so are the others.
        seeds_interval: By bootstrap over seeds.
        seeds_method: Of `seeds_interval`: "BCa" or "percentile".
        images: Intervals by bootstrap over images; of the final mIoU alone.
        tests: P-values of this comparison alone.
        corrected: P-values by Holm's method over the comparison's family.
        n_family: Comparisons of the family that could be tested.
        smallest_effect: Difference that this number of pairs shows with a power of 0.8.
        seeds_needed: Pairs that show a difference of `margin` with a power of 0.8; None if unknown.
        seeds_needed_range: The same for the ends of the spread's 95 % interval.
        verdict: What may be concluded, as a sentence.
    """

    pairs: Pairs
    primary: bool
    margin: float
    mean: float
    spread: float
    t_interval: Ends | None
    seeds_interval: Ends | None
    seeds_method: str
    images: ImageIntervals | None
    tests: PValues
    corrected: PValues
    n_family: int = 1
    smallest_effect: float | None = None
    seeds_needed: int | None = None
    seeds_needed_range: tuple[int, int] | None = None
    verdict: str = ""

    @property
    def n_pairs(self) -> int:
        """Number of seeds that count."""
        return len(self.pairs.seeds)

    @property
    def p(self) -> PValues:
        """The p-values that decide: the primary's own, the corrected ones of all others."""
        return self.tests if self.primary else self.corrected


def compare(
    pairs: Pairs, margin: float, primary: bool, images: ImageIntervals | None
) -> Comparison:
    """Compute all that needs no other comparison."""
    values = np.array(pairs.differences)
    low, high, method = bootstrap_interval(values)
    tests = PValues(
        float(t_test(values)),
        float(sign_flip_test(values)),
        float(equivalence_test(values, margin)),
    )
    spread = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    found = Comparison(
        pairs,
        primary,
        margin,
        mean=float(values.mean()) if len(values) else math.nan,
        spread=spread,
        t_interval=_ends(*t_interval(values)) if spread > NO_SPREAD else None,
        seeds_interval=_ends(low, high),
        seeds_method=method,
        images=images,
        tests=tests,
        corrected=tests,
    )
    return _with_power(found) if spread > NO_SPREAD else found


def correct(family: Sequence[Comparison]) -> list[Comparison]:
    """Correct the p-values of comparisons for how many they are, test by test."""
    columns = {
        name: holm([getattr(each.tests, name) for each in family])
        for name in ("t", "sign_flip", "equivalence")
    }
    n_tests = sum(each.n_pairs > 1 for each in family)
    return [
        replace(
            each,
            corrected=PValues(**{name: float(column[i]) for name, column in columns.items()}),
            n_family=n_tests,
        )
        for i, each in enumerate(family)
    ]


def _with_power(found: Comparison) -> Comparison:
    ends = spread_interval(found.pairs.differences)
    few, many = (seeds_needed(found.margin, end) for end in ends)
    return replace(
        found,
        smallest_effect=smallest_effect(found.spread, found.n_pairs),
        seeds_needed=seeds_needed(found.margin, found.spread),
        seeds_needed_range=(few, many),
    )


def _ends(low: Floats, high: Floats) -> Ends | None:
    ends = float(low), float(high)
    return ends if all(map(math.isfinite, ends)) else None


@dataclass(frozen=True)
class ClassDifference:
    """Difference of one class's IoU, treatment - control, in points.

    Attributes:
        n_pairs: Seeds in which both runs have the class.
        p: Of the t test, corrected by Holm's method over the classes.
        images: 95 % interval by bootstrap over images; None if unknown.
    """

    name: str
    n_pairs: int
    mean: float
    t_interval: Ends | None
    p: float
    images: Ends | None


def compare_classes(
    differences: Mapping[str, Sequence[float]], images: ImageIntervals | None
) -> list[ClassDifference]:
    """Compare class by class.

    Args:
        differences: For each class, of the seeds in which both runs have it.
        images: Intervals in the order of the classes.
    """
    corrected = holm([float(t_test(values)) for values in differences.values()])
    ends = images.classes if images else ()
    return [
        ClassDifference(
            name,
            len(values),
            float(np.mean(values)) if values else math.nan,
            _ends(*t_interval(values)) if len(values) and np.ptp(values) > NO_SPREAD else None,
            float(p),
            ends[i] if len(ends) == len(differences) else None,
        )
        for i, ((name, values), p) in enumerate(zip(differences.items(), corrected, strict=True))
    ]
