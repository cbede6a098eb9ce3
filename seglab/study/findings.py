"""All figures of a study, computed from what its runs have left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from seglab.study.comparisons import ClassDifference, Comparison, compare, compare_classes, correct
from seglab.study.disequilibrium import Mechanism, Traces, read_all_traces, summarize
from seglab.study.image_draws import ImageDraws
from seglab.study.pairs import METRICS, POINTS, Pairs, pair_runs
from seglab.study.reading import StudyRuns
from seglab.study.verdicts import verdict


@dataclass(frozen=True)
class Analysis:
    """All figures of a study.

    Attributes:
        study: What was read.
        margin: Differences below it do not matter, in points.
        comparisons: The primary first.
        classes: Differences of each class's IoU, of every arm from the control.
        mechanism: Summaries of every fusion in every arm.
        traces: What they summarize.
    """

    study: StudyRuns
    margin: float
    comparisons: tuple[Comparison, ...]
    classes: Mapping[str, list[ClassDifference]]
    mechanism: tuple[Mechanism, ...]
    traces: tuple[Traces, ...]

    @property
    def primary(self) -> Comparison:
        """The comparison that the plan names."""
        return self.comparisons[0]


def compute(study: StudyRuns, margin: float) -> Analysis:
    """Compute all figures; writes nothing."""
    draws = ImageDraws(study.folder, study.runs)
    families = _families(study, margin, draws)
    judged = [replace(each, verdict=verdict(each)) for family in families for each in family]
    traces = tuple(read_all_traces(study.folder, study.runs))
    return Analysis(
        study,
        margin,
        tuple(sorted(judged, key=lambda each: not each.primary)),
        {arm: _classes(study, arm, draws) for arm in study.arms if arm != study.control},
        tuple(summarize(traces)),
        traces,
    )


def _families(study: StudyRuns, margin: float, draws: ImageDraws) -> list[list[Comparison]]:
    """Comparisons that are corrected together: of one metric, with one arm or its variants."""
    others = [arm for arm in study.arms if arm not in (study.treatment, study.control)]
    ordered = [study.treatment, *others]
    metrics = sorted(METRICS, key=lambda metric: metric != study.metric)
    against_control, *other_metrics = (
        [_compare(study, arm, study.control, metric, margin, draws) for arm in ordered]
        for metric in metrics
    )
    # Does the treatment do more than its controls? Of the primary metric alone.
    against_others = [
        _compare(study, study.treatment, arm, study.metric, margin, draws) for arm in others
    ]
    of_one_variant = [
        _compare(study, arm, control, study.metric, margin, draws)
        for arm, control in _variants(study)
    ]
    families = (against_control, against_others, of_one_variant, *other_metrics)
    return [correct(family) for family in families if family]


def _variants(study: StudyRuns) -> list[tuple[str, str]]:
    """Arms that `--vary` made, each with the control of the same values: is it better there too?"""
    name = study.control.partition(",")[0]
    found = []
    for arm in study.arms:
        base, comma, values = arm.partition(",")
        control = f"{name},{values}"
        is_new = control != study.control and arm != study.treatment
        if comma and base != name and control in study.arms and is_new:
            found.append((arm, control))
    return found


def _compare(
    study: StudyRuns, treatment: str, control: str, metric: str, margin: float, draws: ImageDraws
) -> Comparison:
    pairs = _pair(study, treatment, control, metric)
    named = (study.treatment, study.control, study.metric)
    images = draws.intervals(pairs) if metric == "final" else None
    return compare(pairs, margin, (treatment, control, metric) == named, images)


def _pair(study: StudyRuns, treatment: str, control: str, metric: str) -> Pairs:
    return pair_runs(study.runs, treatment, control, study.seeds, metric, study.compared)


def _classes(study: StudyRuns, arm: str, draws: ImageDraws) -> list[ClassDifference]:
    pairs = _pair(study, arm, study.control, "final")
    differences: dict[str, list[float]] = {}
    for seed in pairs.seeds:
        theirs = study.runs[study.control, seed].per_class
        for name, iou in study.runs[arm, seed].per_class.items():
            values, other = differences.setdefault(name, []), theirs.get(name)
            if iou is not None and other is not None and math.isfinite(iou - other):
                values.append(POINTS * (iou - other))
    return compare_classes(differences, draws.intervals(pairs))
