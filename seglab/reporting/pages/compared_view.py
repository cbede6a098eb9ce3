"""What the page shows of several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from seglab.reporting import charts
from seglab.reporting.pages import formats
from seglab.reporting.pages.comparison import (
    SeedPair,
    common_split,
    config_differences,
    group_by_config,
    mean_interval,
    pair_by_image,
    pair_by_seed,
    seed_of,
)
from seglab.reporting.pages.run_files import Evaluation, Interval, Run
from seglab.reporting.pages.svg import to_svg


def view_comparison(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """Figures of all runs, differences from the first, and what differs in their configs."""
    split = common_split(runs)
    found: dict[str, Any] = {
        "names": names,
        "configs": [
            (key, [_shown(value) for value in values]) for key, values in config_differences(runs)
        ],
        "chart": _chart(runs, names),
        "rows": [],
        "unpaired": [],
        "classes": [],
        "groups": [],
        "seed_pairs": [],
        "repeated": _repeated(runs, names),
    }
    if split is not None:
        evaluations = [run.evaluation(split) for run in runs]
        _add_figures(found, runs, [item for item in evaluations if item is not None], names)
        _add_seeds(found, runs, names, split)
    return found


def _add_figures(
    found: dict[str, Any],
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    names: Sequence[str],
) -> None:
    paired = [pair_by_image(evaluations[0], item) for item in evaluations[1:]]
    tables = [None, *(pairs if isinstance(pairs, dict) else None for pairs in paired)]
    found["unpaired"] = [
        (name, why) for name, why in zip(names[1:], paired, strict=True) if isinstance(why, str)
    ]
    for run, name, item, table in zip(runs, names, evaluations, tables, strict=True):
        row = {
            "name": name,
            "evaluation": f"{item.split}, {item.results['step']} steps",
            "place": item.folder.name,
            "seed": seed_of(run),
            "miou": formats.percent(item.results.get("mIoU")),
            "ends": formats.ends(item.intervals.get(("mIoU", ""))),
            "others": [formats.percent(item.results.get(key)) for key in ("mAcc", "aAcc")],
            "rate": _rate(run),
        }
        found["rows"].append(row | _difference(table["mIoU", ""] if table else None))
    found["classes"] = _classes(evaluations, tables)


def _difference(interval: Interval | None) -> dict[str, Any]:
    if interval is None:
        return {"difference": "", "difference_ends": "", "is_clear": False}
    return {
        "difference": formats.difference(interval),
        "difference_ends": formats.signed_ends(interval),
        "is_clear": formats.is_clear(interval),
    }


def _classes(
    evaluations: Sequence[Evaluation], tables: Sequence[dict[tuple[str, str], Interval] | None]
) -> list[dict[str, Any]]:
    """One row per class of the first run, one cell per run."""
    each = [{row["name"]: row["IoU"] for row in item.results["classes"]} for item in evaluations]
    return [
        {
            "name": name,
            "cells": [
                {"iou": formats.percent(values.get(name))}
                | _difference(table.get(("IoU", name)) if table else None)
                for values, table in zip(each, tables, strict=True)
            ],
        }
        for name in each[0]
    ]


def _rate(run: Run) -> str:
    rate = run.results.get("cost", {}).get("train_images_per_second")
    return "" if rate is None else f"{rate:.1f}"


def _chart(runs: Sequence[Run], names: Sequence[str]) -> str:
    series = {}
    for run, name in zip(runs, names, strict=True):
        if "val/mIoU" in run.curves:
            steps, values = run.curves["val/mIoU"]
            series[name] = (steps, [100 * value for value in values])
    if not series:
        return ""
    last = "; ".join(f"{name} ends at {values[-1]:.2f}" for name, (_, values) in series.items())
    figure = charts.lines(series, "mean IoU, %")
    return to_svg(figure, "compared-miou", "Mean IoU of every run over steps", f"{last}.")


def _add_seeds(
    found: dict[str, Any], runs: Sequence[Run], names: Sequence[str], split: str
) -> None:
    """Groups of runs that differ in the seed alone, and their differences."""
    groups = group_by_config(runs)
    if all(len(group) == 1 for group in groups):
        return
    named = dict(zip(map(id, runs), names, strict=True))
    for group in groups:
        items = [run.evaluation(split) for run in group]
        found_ious = [item.results["mIoU"] for item in items if item is not None]
        values = [iou for iou in found_ious if iou is not None]
        interval = mean_interval(values) if values else None
        found["groups"].append({
            "names": [named[id(run)] for run in group],
            "seeds": [seed_of(run) for run in group],
            "mean": formats.percent(interval.value if interval else None),
            "ends": formats.ends(interval),
        })  # fmt: skip
    found["seed_pairs"] = [_seed_pair(pair) for pair in pair_by_seed(groups, split, "mIoU")]


def _seed_pair(pair: SeedPair) -> dict[str, Any]:
    return {"first": pair.first + 1, "second": pair.second + 1, "seeds": pair.seeds} | _difference(
        pair.difference
    )


def _repeated(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, str]]:
    """Runs of one config and one seed: the later stands for both where seeds are paired."""
    named = dict(zip(map(id, runs), names, strict=True))
    return [
        (named[id(one)], named[id(two)])
        for group in group_by_config(runs)
        for one, two in combinations(group, 2)
        if seed_of(one) is not None and seed_of(one) == seed_of(two)
    ]


def _shown(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
