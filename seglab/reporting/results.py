"""What a run says when it ends and leaves in results.json and results.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from seglab.reporting.costs import Costs, data_facts, environment
from seglab.reporting.pictures import PictureGrid
from seglab.reporting.run_charts import RunCharts
from seglab.reporting.score_files import ScoreFiles
from seglab.sentences import listed, table_cell
from seglab.visualize import class_colors

PER_CLASS = {
    "IoU": "IoU",
    "Acc": "Acc",
    "Dice": "Dice",
    "BoundaryIoU": "BoundaryIoU",
    "share": "share_of_labels",
}
TITLES = {"BoundaryIoU": "BIoU", "share_of_labels": "% of labels"}
PRINTED = ("mIoU", "mAcc", "mDice", "aAcc", "mBoundaryIoU", "ECE")


class ResultsPrinter(Callback):
    """Prints the per-class table, after `fit` the paths of what was written; keeps both in files.

    `results.md` is the table, `results.json` every figure as a fraction of one, NaN as null, what
    the run cost, and on which machine.
    """

    def __init__(self) -> None:
        self._loaded_step = 0

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the step down: Lightning counts none when it only evaluates."""
        self._loaded_step = int(checkpoint.get("global_step", 0))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print when all else is done, the progress bar included."""
        log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: every rank must ask
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        split = "test" if stage == "test" else "val"
        when = f" after {trainer.global_step} steps" if stage == "fit" else ""
        table = _table(pl_module, split, when)
        intervals = _intervals(trainer) if stage != "fit" else {}
        if table:
            print("\n".join(["", table, *_spreads(intervals)]), end="\n\n")
            print(_remark(pl_module, split), end="")
        for name, path in _written(trainer):
            print(f"{name:<16} {path}")
        if log_dir is None:
            return
        if table:
            step = trainer.global_step or self._loaded_step
            results = {"command": stage, "step": step, "split": split}
            results |= _figures(pl_module, split) | _checkpoints(trainer)
            results |= {"intervals": intervals} if intervals else {}
            results |= _surroundings(trainer, pl_module)
            Path(log_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
            Path(log_dir, "results.md").write_text(_markdown(results))
            print(f"{'results':<16} {Path(log_dir, 'results.md')}")
        print(f"{'logs':<16} {log_dir}")


def _table(task: Any, split: str, when: str) -> str:
    metrics = task.metrics[split]
    # The results were gathered from all ranks when they were logged; only their cache is read.
    if not metrics.update_called:
        return ""
    results = task.results(split)
    more = {}
    if "BoundaryIoU" in results:
        more["BIoU"] = results["BoundaryIoU"], results["mBoundaryIoU"]
    table = metrics.table(task.class_names, more)
    error = f"\ncalibration error {100 * results['ECE']:.2f}" if "ECE" in results else ""
    return f"{split}{when}, in percent\n{table}{error}"


def _intervals(trainer: Trainer) -> dict[str, list[float | None]]:
    """Of each average, the ends of its 95 % interval over images."""
    files = [c for c in trainer.callbacks if isinstance(c, ScoreFiles)]  # type: ignore[attr-defined]
    return {key: [_number(end) for end in ends] for c in files for key, ends in c.intervals.items()}


def _spreads(intervals: Mapping[str, Sequence[float | None]]) -> list[str]:
    """The intervals of what the table prints, in lines of at most 100 characters."""
    ends = {key: [_percent(end) for end in intervals[key]] for key in PRINTED if key in intervals}
    parts = [f"{key} {low} to {high}" for key, (low, high) in ends.items()]
    return wrap(f"95 % over images: {', '.join(parts)}", 100) if parts else []


def _remark(task: Any, split: str) -> str:
    """Names the classes of which nothing was found, and what may help."""
    figures = task.metrics[split].compute()
    rows = zip(task.class_names, figures["share"], figures["Acc"], strict=True)
    lost = [name for name, share, found in rows if share > 0 and found == 0]
    if not lost:
        return ""
    return (
        f"no pixel was found of {listed(lost)}: more steps, pretrained weights or class weights "
        "may help (docs/networks.md)\n\n"
    )


def _figures(task: Any, split: str) -> dict[str, Any]:
    figures = task.results(split)
    known = {theirs: ours for theirs, ours in PER_CLASS.items() if theirs in figures}
    columns = {ours: figures[theirs].tolist() for theirs, ours in known.items()}
    colors = class_colors(task.palette, task.num_classes).tolist()
    classes = [
        {"name": name, "color": color}
        | {key: _number(column[index]) for key, column in columns.items()}
        for index, (name, color) in enumerate(zip(task.class_names, colors, strict=True))
    ]
    losses = task.losses[split]
    loss = {"loss": _number(float(losses.compute()))} if losses.update_called else {}
    averages = {key: _number(value) for key, value in figures.items() if isinstance(value, float)}
    return {**averages, **loss, "classes": classes}


def _surroundings(trainer: Trainer, task: Any) -> dict[str, Any]:
    costs = [c for c in trainer.callbacks if isinstance(c, Costs)]  # type: ignore[attr-defined]
    counted = {"cost": costs[0].figures()} if costs else {}
    return {
        "parameters": sum(weight.numel() for weight in task.network.parameters()),
        "data": data_facts(trainer),
        "environment": environment(trainer),
        **counted,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no other


def _checkpoints(trainer: Trainer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for callback in _savers(trainer):
        if callback.monitor is None:
            found["last_checkpoint"] = callback.best_model_path
        else:
            score = callback.best_model_score
            found["best_checkpoint"] = callback.best_model_path
            found[f"best_{callback.monitor}"] = None if score is None else _number(float(score))
    return found


def _markdown(results: dict[str, Any]) -> str:
    """The console's table for pages that render Markdown."""
    keys = [key for key in PER_CLASS.values() if key in results["classes"][0]]
    titles = " | ".join(TITLES.get(key, key) for key in keys)
    lines = [
        f"{results['split']} after {results['step']} steps, in percent",
        "",
        f"| class | {titles} |",
        f"|---|{'--:|' * len(keys)}",
    ]
    for row in results["classes"]:
        cells = " | ".join(_percent(row[key]) for key in keys)
        lines.append(f"| {table_cell(row['name'])} | {cells} |")
    mean = " | ".join(_percent(results[f"m{key}"]) for key in keys[:-1])
    rest = " |" * (len(keys) - 2)
    lines += [f"| mean | {mean} | |", f"| all | | {_percent(results['aAcc'])} |{rest}", ""]
    if spreads := _spreads(results.get("intervals", {})):
        lines += [*spreads, ""]
    if "ECE" in results:
        lines += [f"calibration error {_percent(results['ECE'])}", ""]
    if "loss" in results:
        loss = results["loss"]
        lines += [f"{results['split']}/loss {'nan' if loss is None else f'{loss:.6g}'}", ""]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _written(trainer: Trainer) -> list[tuple[str, str | Path]]:
    found: list[tuple[str, str | Path]] = []
    for callback in _savers(trainer):
        if callback.best_model_score is not None:
            found.append((f"best {callback.monitor}", f"{callback.best_model_score:.4f}"))
        kind = "last" if callback.monitor is None else "best"
        found.append((f"{kind} checkpoint", callback.best_model_path))
    grids = [c for c in trainer.callbacks if isinstance(c, PictureGrid)]  # type: ignore[attr-defined]
    drawn = [c for c in trainer.callbacks if isinstance(c, RunCharts)]  # type: ignore[attr-defined]
    found += [("charts", charts.remark) for charts in drawn if charts.remark]
    return [("pictures", grid.folder) for grid in grids if grid.folder is not None] + found


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return [callback for callback in found if callback.best_model_path]
