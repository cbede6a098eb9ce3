"""What the page shows of one run: figures in words, charts and pictures as markup."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seglab.reporting import charts
from seglab.reporting.pages import formats
from seglab.reporting.pages.run_files import Curve, Evaluation, Run
from seglab.reporting.pages.svg import to_svg

AVERAGES = {
    "mIoU": "mean IoU", "mAcc": "mean accuracy", "aAcc": "pixel accuracy", "mDice": "mean Dice",
    "mPrecision": "mean precision", "fwIoU": "IoU weighted by share",
}  # fmt: skip
EXTRAS = {"mBoundaryIoU": "mean boundary IoU", "ECE": "calibration error"}
"""Figures of `extra_metrics`, shown where they were asked for."""
_MOST_CELLS = 16  # classes of a confusion matrix that is a table
_MOST_POINTS = 400  # of a curve
_N_CONFUSED = 12
_ENVIRONMENT = ("date", "command")  # shown first


def view_run(run: Run, ident: str, program: str) -> dict[str, Any]:
    """All that the page's template needs of one run.

    Args:
        run: What was read.
        ident: Begins all ids of its sections.
        program: How the program is called, for sentences that say what to type.
    """
    checkpoint = str(run.checkpoint or run.folder / "checkpoints" / "best.ckpt")
    cost = run.results.get("cost", {})
    return {
        "id": ident,
        "name": run.name,
        "folder": str(run.folder),
        "checkpoint": checkpoint,
        "has_checkpoint": run.checkpoint is not None,
        "validate": f"{program} validate --ckpt_path {checkpoint}",
        "tiles": _tiles(run),
        "evaluations": [
            view_evaluation(item, f"{ident}-e{number}", item.folder != run.folder)
            for number, item in enumerate(run.evaluations)
        ],
        "curves": _curves(run, ident),
        "validations": _validations(run.curves),
        "pictures": _pictures(run),
        "scales": _scales(run, ident),
        "cost": _cost_rows(cost, run.results.get("parameters")),
        "environment": _environment(run.results.get("environment", {})),
        "data": run.results.get("data", {}),
        "config": run.config_text,
    }


def _tiles(run: Run) -> list[dict[str, str]]:
    """Headline figures: of a test if there is one, else of the validation."""
    chosen = run.evaluation("test") or run.evaluation("val")
    if chosen is None:
        return []
    tiles = []
    for key in ("mIoU", "mAcc", "aAcc", "mDice"):
        interval = chosen.intervals.get((key, ""))
        note = formats.ends(interval)
        tiles.append({
            "label": f"{chosen.split} {AVERAGES[key]}",
            "value": formats.percent(chosen.results.get(key)), "unit": "%",
            "note": f"95 %: {note}" if note else "",
        })  # fmt: skip
    best = run.results.get("best_val/mIoU")
    if best is not None:
        tiles.append({
            "label": "best val mean IoU", "value": formats.percent(best), "unit": "%",
            "note": "of all validations of the training",
        })  # fmt: skip
    return tiles


def view_evaluation(item: Evaluation, ident: str, is_beside: bool) -> dict[str, Any]:
    """Tables and pictures of one evaluation."""
    classes = [_class_row(item, row) for row in item.results["classes"]]
    names = [row["name"] for row in classes]
    spans = [item.intervals.get(("IoU", name)) for name in names]
    known = [(row["iou"], (s.low, s.high)) if s else None
             for row, s in zip(classes, spans, strict=True)]  # fmt: skip
    return {
        "id": ident,
        "title": item.title,
        "folder": str(item.folder) if is_beside else "",
        "remarks": item.remarks,
        "averages": average_rows(item),
        "loss": item.results.get("loss"),
        "loss_ends": formats.ends(item.intervals.get(("loss", "")), 4, unit=1),
        "classes": classes,
        "has_boundaries": any("BoundaryIoU" in row for row in item.results["classes"]),
        "has_intervals": bool(item.intervals),
        "chart": _class_chart(names, known, ident, item.title) if len(names) > 1 else "",
        "confusion": _confusion(item, names),
        "extremes": _extremes(item),
        "legend": [row for row in classes if row["color"]],
    }  # fmt: skip


def average_rows(item: Evaluation) -> list[tuple[str, str, str]]:
    """Each average of the set: what it is, its value, the ends of its interval."""
    extras = {key: name for key, name in EXTRAS.items() if key in item.results}
    return [
        (name, formats.percent(item.results.get(key)), formats.ends(item.intervals.get((key, ""))))
        for key, name in (AVERAGES | extras).items()
    ]


def _class_row(item: Evaluation, row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {
        key: formats.percent(row.get(key)) for key in ("IoU", "Acc", "Dice", "share_of_labels")
    }
    precision = item.intervals.get(("Precision", row["name"]))
    color = row.get("color")
    return {
        "name": row["name"],
        "color": "#{:02x}{:02x}{:02x}".format(*color) if color else "",
        "iou": _nan(row.get("IoU")),
        "cells": [*cells.values()][:3],
        "precision": formats.percent(precision.value if precision else None),
        "boundary": formats.percent(row.get("BoundaryIoU")),
        "share": cells["share_of_labels"],
        "interval": formats.ends(item.intervals.get(("IoU", row["name"]))),
        "bar": f"{100 * (row.get('IoU') or 0):.1f}%",
    }


def _nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _class_chart(names: Sequence[str], known: Sequence[Any], ident: str, title: str) -> str:
    shown = [(name, *pair) for name, pair in zip(names, known, strict=True)
             if pair and isfinite(pair[0])]  # fmt: skip
    if not shown:
        return ""
    labels, values, spans = zip(*shown, strict=True)
    low, high = np.argmin(values), np.argmax(values)
    words = f"Lowest {labels[low]}, highest {labels[high]}; the table below has all figures."
    figure = charts.class_bars(labels, values, spans)
    return to_svg(figure, f"{ident}-classes-chart", f"IoU by class with intervals, {title}", words)


def _confusion(item: Evaluation, names: Sequence[str]) -> dict[str, Any] | None:
    if item.confusion is None:
        return None
    counts = item.confusion
    labelled = counts.sum(1, keepdims=True)
    parts = np.where(labelled > 0, counts / np.maximum(labelled, 1), np.nan)
    small = len(names) <= _MOST_CELLS
    cells = [[(formats.percent(v, 1), f"{100 * np.nan_to_num(v):.1f}%", v > 0.85) for v in row]
             for row in parts]  # fmt: skip
    return {
        "rows": list(zip(names, cells, strict=True)) if small else [],
        "names": names,
        "picture": None if small else formats.inline_picture(item.folder / "confusion.png"),
        "confused": most_confused(counts, names),
    }


def most_confused(
    counts: NDArray[np.int64], names: Sequence[str], n_most: int = _N_CONFUSED
) -> list[tuple[str, str, str, int]]:
    """The pairs of classes with the most pixels taken for another class.

    Returns:
        Label, prediction, percent of the label's pixels, and pixels; the largest first.

    >>> most_confused(np.array([[8, 2], [0, 5]]), ["road", "path"])
    [('road', 'path', '20.00', 2)]
    """
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[:n_most]
    found = []
    for label, prediction in zip(*np.unravel_index(order, wrong.shape), strict=True):
        pixels = int(wrong[label, prediction])
        if pixels:
            share = pixels / int(counts[label].sum())
            found.append((names[label], names[prediction], formats.percent(share), pixels))
    return found


def _extremes(item: Evaluation) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"worst": [], "best": []}
    for row in item.extremes:
        picture = formats.inline_picture(item.folder / row["file"])
        if picture is not None:
            score = formats.percent(row["mIoU"], 1)
            found[row["kind"]].append({"name": row["name"], "score": score, "picture": picture})
    return found


def _curves(run: Run, ident: str) -> list[str]:
    """Loss, learning rate, mIoU and IoU of each class over the steps."""
    found: list[str] = []

    def add(key: str, title: str, wanted: Mapping[str, str], label: str, factor: float) -> None:
        series = {
            name: _thinned(run.curves[column], factor)
            for column, name in wanted.items()
            if column in run.curves
        }
        if series:
            drawn = charts.lines(series, label)
            found.append(to_svg(drawn, f"{ident}-{key}", title, _last_values(series)))

    add("loss", "Loss over steps", {"train/loss": "train", "val/loss": "val"}, "loss", 1)
    rate = "lr" if "lr" in run.curves else "lr/pg1"
    add("lr", "Learning rate over steps", {rate: "learning rate"}, "learning rate", 1)
    averages = {"val/mIoU": "mean IoU", "val/mAcc": "mean accuracy", "val/aAcc": "pixel accuracy"}
    add("averages", "Averages of the validations over steps", averages, "%", 100)
    classes = {name[8:]: curve for name, curve in run.curves.items() if name.startswith("val/IoU/")}
    if classes:
        found.append(_class_curves(classes, run.curves["val/mIoU"][0], ident))
    return found


def _class_curves(classes: Mapping[str, Curve], steps: Sequence[float], ident: str) -> str:
    table = np.full((len(steps), len(classes)), np.nan)
    places = {step: index for index, step in enumerate(steps)}
    for column, (at, values) in enumerate(classes.values()):
        for step, value in zip(at, values, strict=True):
            if step in places:
                table[places[step], column] = value
    figure = charts.class_lines(steps, table, list(classes))
    words = "The table of validations and the table of classes have the figures."
    return to_svg(figure, f"{ident}-classes", "IoU of each class over steps", words)


def _thinned(curve: Curve, factor: float) -> Curve:
    """At most `_MOST_POINTS` points, each the mean of its neighbours."""
    steps, values = np.array(curve[0]), factor * np.array(curve[1])
    if len(steps) > _MOST_POINTS:
        parts = np.array_split(np.arange(len(steps)), _MOST_POINTS)
        steps, values = (np.array([x[part].mean() for part in parts]) for x in (steps, values))
    return steps.tolist(), values.tolist()


def _last_values(series: charts.Series) -> str:
    parts = [f"{name} ends at {values[-1]:.4g}" for name, (_, values) in series.items()]
    return f"{'; '.join(parts)}."


def _validations(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """A table beside the charts: one row per validation."""
    figures = (f"val/{key}" for key in AVERAGES | EXTRAS)
    columns = [name for name in ("val/loss", *figures) if name in curves]
    if "val/mIoU" not in columns:
        return {"columns": [], "rows": []}
    values = {name: dict(zip(*curves[name], strict=True)) for name in columns}
    rows = []
    for step in curves["val/mIoU"][0]:
        cells = [values[name].get(step) for name in columns]
        shown = [
            f"{cell:.4f}" if name == "val/loss" and cell is not None else formats.percent(cell)
            for name, cell in zip(columns, cells, strict=True)
        ]
        rows.append([f"{step + 1:g}", *shown])
    return {"columns": [name.removeprefix("val/") for name in columns], "rows": rows}


def _pictures(run: Run) -> list[dict[str, Any]]:
    """The last grid of the validations, then the first and the one between."""
    files = run.pictures
    chosen = dict.fromkeys([*files[-1:], *files[:1], *files[len(files) // 2 : len(files) // 2 + 1]])
    shown = [(path, formats.inline_picture(path)) for path in chosen]
    return [{"step": int(path.stem.rpartition("_")[2]), **picture}
            for path, picture in shown if picture]  # fmt: skip


def _scales(run: Run, ident: str) -> dict[str, Any] | None:
    if not run.scales:
        return None
    rows = charts.scale_rows(run.scales)
    chart = ""
    if rows:
        stds = [row["std"] for row in rows]
        words = f"Between {min(stds):.3g} and {max(stds):.3g}; the table below has all figures."
        figure = charts.scale_bars(rows)
        chart = to_svg(figure, f"{ident}-scales", "Standard deviation of each branch", words)
    return {
        "rows": rows,
        "chart": chart,
        "n_left_out": max(0, len(rows) - charts.MOST_BARS),
        "mode": run.scales.get("mode", ""),
        "batches": run.scales.get("batches"),
        "refusals": run.scales.get("refusals", []),
        "notes": run.scales.get("notes", []),
    }


def _cost_rows(cost: Mapping[str, Any], parameters: int | None) -> list[tuple[str, str]]:
    words: dict[str, tuple[str, Callable[[Any], str]]] = {
        "train_seconds": ("training, without validations", formats.duration),
        "train_images": ("images trained on", lambda n: f"{n:,}"),
        "train_images_per_second": ("training, images/s", lambda rate: f"{rate:.1f}"),
        "eval_seconds": ("evaluation", formats.duration),
        "eval_images": ("images evaluated", lambda n: f"{n:,}"),
        "eval_images_per_second": ("evaluation, images/s", lambda rate: f"{rate:.1f}"),
        "peak_memory_bytes": ("peak memory of the GPU", formats.size),
        "peak_process_bytes": ("peak memory of the process", formats.size),
    }
    rows = [(name, show(cost[key])) for key, (name, show) in words.items() if key in cost]
    return rows + ([("parameters", f"{parameters:,}")] if parameters else [])


def _environment(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    order = sorted(values, key=lambda key: key not in _ENVIRONMENT)
    return [(key, str(values[key])) for key in order]
