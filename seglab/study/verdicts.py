"""What may be concluded from a comparison, as a sentence."""

from __future__ import annotations

from seglab.study.comparisons import ALPHA, Comparison
from seglab.study.significance import NO_SPREAD


def verdict(found: Comparison) -> str:
    """Say what a comparison shows.

    - better or worse: the p-value of the t test is at most 0.05;
    - equivalent: else, that of TOST is;
    - not decided: else.

    The p-values are the primary comparison's own, or corrected for all of an exploratory
    comparison's family.
    """
    n = found.n_pairs
    if n == 0:
        return "nothing to compare: no pair"
    if n == 1:
        return f"one pair, {found.mean:+.2f} points: no interval and no test"
    if found.spread <= NO_SPREAD:
        same = "identical" if abs(found.mean) <= NO_SPREAD else f"{found.mean:+.2f} points"
        return f"{same} in all {n} pairs: no spread, hence no test"
    return _decided(found) + _doubt(found)


def _decided(found: Comparison) -> str:
    assert found.t_interval is not None  # there is a spread
    (low, high), margin = found.t_interval, f"{found.margin:g} points"
    if found.p.t <= ALPHA:
        word = "better" if found.mean > 0 else "worse"
        least = min(abs(low), abs(high))
        size = f"{word} by {abs(found.mean):.2f} points ({low:+.2f} to {high:+.2f})"
        if found.primary:
            size = f"{word} by at least {least:.2f} points, by {abs(found.mean):.2f} on average"
        small = found.p.equivalence <= ALPHA
        return size + (f", yet by less than {margin}" if small else "")
    if found.p.equivalence <= ALPHA:
        return f"equivalent within {margin}"
    return f"not decided: {_needed(found)}"


def _needed(found: Comparison) -> str:
    margin, n, needed = f"{found.margin:g} points", found.n_pairs, found.seeds_needed or 0
    few, many = found.seeds_needed_range or (0, 0)
    if not found.primary and found.tests.t <= ALPHA:
        return f"a difference before, none after correction for {found.n_family} comparisons"
    if needed <= n:
        return (
            f"neither zero nor {margin} is ruled out, though {n} seeds show {margin} in four of"
            " five studies of this spread"
        )
    return (
        f"{needed} seeds would be needed to show {margin} ({few} to {many}, the spread being"
        f" known from {n} pairs)"
    )


def _doubt(found: Comparison) -> str:
    """Where the test without a normal distribution says otherwise."""
    smallest = 2.0 ** (1 - found.n_pairs)
    by_t, by_signs = found.p.t <= ALPHA, found.p.sign_flip <= ALPHA
    if by_t and smallest > ALPHA:
        return f"; {found.n_pairs} seeds are too few for the sign-flip test to say so too"
    if by_t != by_signs:
        return f"; the sign-flip test says otherwise (p = {found.p.sign_flip:.3f})"
    return ""
