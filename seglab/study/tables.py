"""Tables of an analysis, as rows of text that Markdown and HTML share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from seglab.study.comparisons import ALPHA, Comparison, Ends
from seglab.study.disequilibrium import Mechanism
from seglab.study.findings import Analysis
from seglab.study.pairs import METRICS, figure

NOTHING = "-"
NAMES = {"final": "final mIoU", "best": "best mIoU", "area": "area under curve"}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        note: What a reader must know to read it.
        rows: Each as long as `header`.
        n_words: Columns from the left that hold words; the others hold numbers.
        marked: Rows that stand out.
    """

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    n_words: int = 1
    marked: frozenset[int] = frozenset()


def tables(found: Analysis) -> Iterator[Table]:
    """All tables of a study that have rows."""
    made = (verdicts, differences, tests, arms, runs, left_out, classes, mechanism)
    return (table for table in (make(found) for make in made) if table.rows)


def verdicts(found: Analysis) -> Table:
    """One sentence per comparison in the primary metric."""
    chosen = [c for c in found.comparisons if c.pairs.metric == found.study.metric]
    rows = [(comparison_name(c), _kind(c), c.verdict) for c in chosen]
    note = (
        "The plan named the primary comparison before the first run. All others explore: what they"
        " show is a reason for a study of its own."
    )
    return Table("Verdicts", note, ("comparison", "", "verdict"), rows, 3, _primary_rows(chosen))


def differences(found: Analysis) -> Table:
    """Mean differences and their intervals."""
    rows = [
        (
            comparison_name(c), NAMES[c.pairs.metric], str(c.n_pairs), signed(c.mean),
            number(c.spread), ends(c.t_interval), ends(c.seeds_interval), c.seeds_method or NOTHING,
            ends(c.images.images if c.images else None),
            ends(c.images.seeds_and_images if c.images else None),
        )
        for c in found.comparisons
    ]  # fmt: skip
    header = (
        "comparison", "of", "pairs", "mean", "deviation", "95 %, t", "seeds drawn", "by",
        "images drawn", "both drawn",
    )  # fmt: skip
    note = (
        "Paired differences in points. The intervals are of the mean: Student's t, which decides,"
        " and bootstraps over seeds, over validation images with these runs, and over both."
    )
    return Table("Differences", note, header, rows, 2, _primary_rows(found.comparisons))


def tests(found: Analysis) -> Table:
    """P-values, and what this number of seeds can show."""
    rows = [
        (
            comparison_name(c), NAMES[c.pairs.metric], p_value(c.tests.t), p_value(c.corrected.t),
            p_value(c.tests.sign_flip), p_value(c.corrected.sign_flip),
            p_value(c.tests.equivalence), p_value(c.corrected.equivalence),
            number(c.smallest_effect),
            NOTHING if c.seeds_needed is None else f"{c.seeds_needed}",
            "{} to {}".format(*c.seeds_needed_range) if c.seeds_needed_range else NOTHING,
        )
        for c in found.comparisons
    ]  # fmt: skip
    header = (
        "comparison", "of", "p, t", "Holm", "p, sign flips", "Holm", "p, TOST", "Holm",
        "shown by these", "seeds needed", "95 %",
    )  # fmt: skip
    note = (
        f"TOST: of a difference of {found.margin:g} points or more. Holm: corrected for all"
        " comparisons of a metric with the same arm. Shown by these: the difference that these"
        f" seeds show with a power of 0.8; seeds needed: those that show {found.margin:g} points."
    )
    return Table("Tests and power", note, header, rows, 2, _primary_rows(found.comparisons))


def arms(found: Analysis) -> Table:
    """Mean and deviation over seeds of every arm."""
    study, rows = found.study, []
    for arm in study.arms:
        ended = [r for (name, _), r in study.runs.items() if name == arm]
        done = [r for r in ended if r.status == "finished"]
        cells = [_mean_and_deviation([figure(r, metric) for r in done]) for metric in METRICS]
        seconds = f"{np.median([r.seconds for r in done]):.0f}" if done else NOTHING
        rows.append((arm, f"{len(done)} of {len(study.seeds)}", *cells, seconds))
    note = "Mean and standard deviation over the finished runs, in percent, paired or not."
    header = ("arm", "finished", *(NAMES[metric] for metric in METRICS), "seconds, median")
    return Table("Arms", note, header, rows)


def runs(found: Analysis) -> Table:
    """The primary metric of every run."""
    study, metric = found.study, found.study.metric
    rows = []
    for seed in study.seeds:
        cells = [_cell(found, arm, seed, metric) for arm in study.arms]
        rows.append((str(seed), *cells))
    return Table(
        "Runs", f"The {NAMES[metric]} of every run, in percent.", ("seed", *study.arms), rows
    )


def left_out(found: Analysis) -> Table:
    """Pairs that do not count."""
    found_for: dict[tuple[str, str], tuple[dict[str, None], set[int]]] = {}
    for name, of, seed, reason in _reasons(found):
        metrics, seeds = found_for.setdefault((name, reason), ({}, set()))
        metrics[of] = None
        seeds.add(seed)
    rows = [
        (name, ", ".join(metrics), ", ".join(map(str, sorted(seeds))), reason)
        for (name, reason), (metrics, seeds) in found_for.items()
    ]
    return Table("Left out", "", ("comparison", "of", "seeds", "reason"), rows, 4)


def classes(found: Analysis) -> Table:
    """Difference of each class's IoU from the control, arm by arm."""
    arms = list(found.classes)
    names = dict.fromkeys(each.name for members in found.classes.values() for each in members)
    cells = {
        (arm, each.name): f"{signed(each.mean)} ({ends(each.t_interval or each.images)})"
        + ("*" if each.p <= ALPHA else "")
        for arm, members in found.classes.items()
        for each in members
        if each.n_pairs
    }
    rows = [(name, *(cells.get((arm, name), NOTHING) for arm in arms)) for name in names]
    header = ("class", *(f"{arm} - {found.study.control}" for arm in arms))
    note = (
        "IoU of the last validation: mean difference and 95 % interval (t; over images"
        " where there is one seed or no spread). * p at most 0.05 after Holm's correction for the"
        " classes. Exploratory."
    )
    return Table("Classes", note, header, rows)


def mechanism(found: Analysis) -> Table:
    """How far branches are apart at the first and the last measurement."""
    note = (
        "Medians over seeds, first measurement > last. Std: largest by smallest standard deviation"
        " of a branch at the concatenation, before its slice of the weight; share: largest minus"
        " smallest part of the fused output's variance; gradient and update: largest by smallest of"
        " a slice. Settled: step from which on the ratio of stds is within a tenth of its last"
        " value."
    )
    header = ("fusion", "arm", "runs", "steps", "std", "share", "gradient", "update", "settled")
    rows = [_mechanism_row(each) for each in found.mechanism]
    return Table("Mechanism", note, header, rows, 2)


def _mechanism_row(each: Mechanism) -> tuple[str, ...]:
    quantities = (each.std_ratio, each.share_spread, each.gradient_ratio, each.update_ratio)
    settled = NOTHING if math.isnan(each.settled_step) else f"{each.settled_step:.0f}"
    return (
        each.fusion, each.arm, str(each.n_runs), f"{each.first_step:.0f} > {each.last_step:.0f}",
        *(f"{number(first)} > {number(last)}" for first, last in quantities), settled,
    )  # fmt: skip


def comparison_name(found: Comparison) -> str:
    """`treatment - control`."""
    return f"{found.pairs.treatment} - {found.pairs.control}"


def _kind(found: Comparison) -> str:
    return "primary" if found.primary else "exploratory"


def _primary_rows(chosen: Sequence[Comparison]) -> frozenset[int]:
    return frozenset(i for i, each in enumerate(chosen) if each.primary)


def _cell(found: Analysis, arm: str, seed: int, metric: str) -> str:
    run = found.study.runs.get((arm, seed))
    if run is not None and run.status != "finished":
        return "failed"
    return "missing" if run is None else number(figure(run, metric))


def _mean_and_deviation(values: Sequence[float]) -> str:
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return NOTHING
    return number(float(np.mean(kept))) + (f" ± {np.std(kept, ddof=1):.2f}" if kept[1:] else "")


def _reasons(found: Analysis) -> Iterator[tuple[str, str, int, str]]:
    """Comparison, what of it, seed and reason of all that is left out."""
    for c in found.comparisons:
        for seed, reason in c.pairs.left_out.items():
            yield comparison_name(c), NAMES[c.pairs.metric], seed, reason
        for seed, reason in (c.images.left_out if c.images else {}).items():
            yield comparison_name(c), "drawn images", seed, reason


def number(value: float | None) -> str:
    """Two decimals."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.2f}"


def signed(value: float) -> str:
    """Two decimals and a sign."""
    return NOTHING if math.isnan(value) else f"{value:+.2f}"


def p_value(value: float) -> str:
    """Three decimals, or what it is below."""
    if math.isnan(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def ends(interval: Ends | None) -> str:
    """Both ends of an interval, signed."""
    return NOTHING if interval is None else f"{interval[0]:+.2f} to {interval[1]:+.2f}"
