"""Compare runs image by image, and seed by seed where configs differ in nothing else.

Two networks find the same images hard, so the difference of their figures is known better than
either figure. Drawing the same images for both (the paired bootstrap) keeps what they share out of
the interval. It speaks of other images, not of another training; that is what seeds are for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from seglab.image_scores import draw_sums, figures, quantiles
from seglab.metrics import AVERAGES
from seglab.reporting.pages.run_files import Counts, Evaluation, Interval, Run

IGNORED = ("seed_everything", "ckpt_path", "trainer.default_root_dir", "trainer.logger")
"""Keys of a config that make no other experiment."""
_ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class SeedPair:
    """Two configs, compared over the seeds that both were trained with.

    Attributes:
        first: Index of the first config.
        second: Of the second.
        seeds: That both have.
        difference: Mean of second minus first, with its 95 % t interval; NaN ends for one seed.
    """

    first: int
    second: int
    seeds: tuple[int, ...]
    difference: Interval


def common_split(runs: Sequence[Run]) -> str | None:
    """The split that all runs were evaluated on, test before validation; None if there is none."""
    for split in ("test", "val"):
        if all(run.evaluation(split) is not None for run in runs):
            return split
    return None


def pair_by_image(first: Evaluation, second: Evaluation) -> dict[tuple[str, str], Interval] | str:
    """Differences second minus first of every figure, with 95 % intervals over images.

    Returns:
        By figure and class, as `Evaluation.intervals`; or why there are none, as a sentence.
    """
    one, two = first.counts, second.counts
    if one is None or two is None:
        return "counts.npz is missing: validate or test the checkpoint again"
    if one.class_names != two.class_names:
        return "the classes differ"
    if len(one.names) < 2 or sorted(one.names) != sorted(two.names):
        return "the images differ"
    if not torch.equal(_ordered(one)[:, 1], _ordered(two)[:, 1]):
        return "the labels of the images differ"
    return _differences(_ordered(one), _ordered(two), one.class_names)


def _ordered(counts: Counts) -> torch.Tensor:
    order = sorted(range(len(counts.names)), key=counts.names.__getitem__)
    return torch.from_numpy(counts.values[order])


def _differences(
    one: torch.Tensor, two: torch.Tensor, class_names: Sequence[str]
) -> dict[tuple[str, str], Interval]:
    values = [figures(counts.sum(0)) for counts in (one, two)]
    draws = [figures(draw_sums(counts)) for counts in (one, two)]  # of the same images
    found = {}
    for key in (*AVERAGES, "IoU"):
        value = np.atleast_1d(values[1][key] - values[0][key])
        ends = quantiles((draws[1][key] - draws[0][key]).reshape(-1, value.size), _ENDS)
        for index, name in enumerate(class_names if key == "IoU" else ("",)):
            cells = (value[index], *ends[:, index])
            found[key, name] = Interval(*(float(cell) for cell in cells))
    return found


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level of dotted keys.

    >>> flatten({"a": {"b": 1, "c": {}}})
    {'a.b': 1, 'a.c': {}}
    """
    if not isinstance(values, Mapping) or not values:
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Keys whose values are not the same in all runs, with the value of each."""
    configs = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key) for config in configs]) for key in keys]
    shown = [row for row in rows if not row[0].startswith(IGNORED[1:])]
    return [row for row in shown if any(value != row[1][0] for value in row[1])]


def group_by_config(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs whose configs differ in nothing but the seed, together; in their order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        kept = {k: v for k, v in flatten(run.config).items() if not k.startswith(IGNORED)}
        groups.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def seed_of(run: Run) -> int | None:
    """The seed of a run's config."""
    seed = run.config.get("seed_everything")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def pair_by_seed(groups: Sequence[Sequence[Run]], split: str, figure: str) -> list[SeedPair]:
    """Compare the first group with each other one over the seeds they share."""
    tables = [_by_seed(group, split, figure) for group in groups]
    pairs = []
    for index, table in enumerate(tables[1:], 1):
        seeds = tuple(sorted(tables[0].keys() & table.keys()))
        if seeds:
            found = [table[seed] - tables[0][seed] for seed in seeds]
            pairs.append(SeedPair(0, index, seeds, mean_interval(found)))
    return pairs


def _by_seed(group: Sequence[Run], split: str, figure: str) -> dict[int, float]:
    found = {}
    for run in group:
        seed, evaluation = seed_of(run), run.evaluation(split)
        if seed is not None and evaluation is not None and evaluation.results[figure] is not None:
            found[seed] = float(evaluation.results[figure])
    return found


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean with its 95 % interval by Student's t; NaN ends for a single value.

    >>> [round(end, 3) for end in mean_interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    from seglab.study.intervals import t_interval

    low, high = t_interval(values)
    return Interval(float(np.mean(values)), float(low), float(high))
