"""A model card in Markdown: what a model is, what it was measured to do, and what it cannot."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

from seglab.reporting.pages import formats
from seglab.reporting.pages.run_files import Evaluation, Run
from seglab.reporting.pages.templates import templates
from seglab.reporting.pages.views import average_rows
from seglab.sentences import table_cell

WEAK = 0.5  # IoU below which a class is named among the limits


def write_card(run: Run, path: Path, program: str = "seglab") -> None:
    """Write the card of a run.

    Args:
        run: What was read.
        path: Of the Markdown file.
        program: How commands begin that the card proposes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = templates().get_template("card.md").render(**_facts(run), program=program)
    path.write_text(text, encoding="utf-8")


def _facts(run: Run) -> dict[str, Any]:
    shown = run.evaluation("test") or run.evaluation("val")
    model = run.config.get("model", {})
    network = model.get("network", {})
    options = network.get("init_args", {})
    return {
        "run": run,
        "name": run.name.rpartition("/")[0] or run.name,
        "checkpoint": run.checkpoint.name if run.checkpoint else "best.ckpt",
        "folder": str(run.folder),
        "network": _class_of(network),
        "parts": [
            (part, _class_of(options[part]), (options[part].get("init_args") or {}).get("name"))
            for part in ("encoder", "head", "auxiliary")
            if isinstance(options.get(part), dict)
        ],
        "results": run.results,
        "data": run.results.get("data", {}),
        "module": _class_of(run.config.get("data", {})),
        "evaluation": shown,
        "averages": average_rows(shown) if shown else [],
        "classes": _classes(shown) if shown else [],
        "training": _training(run, model),
        "limits": _limits(run, shown),
    }


def _class_of(section: Any) -> str:
    path = section.get("class_path", "") if isinstance(section, dict) else str(section or "")
    return str(path).rpartition(".")[2]


def _classes(item: Evaluation) -> list[tuple[str, str, str, str]]:
    return [
        (
            table_cell(row["name"]),
            formats.percent(row["IoU"]),
            formats.ends(item.intervals.get(("IoU", row["name"]))),
            formats.percent(row["share_of_labels"]),
        )
        for row in item.results["classes"]
    ]


def _training(run: Run, model: dict[str, Any]) -> list[tuple[str, str]]:
    data = (run.config.get("data") or {}).get("init_args") or {}
    optimizer = model.get("optimizer") or {}
    rate = (optimizer.get("init_args") or {}).get("lr")
    rows = [
        ("steps", run.results.get("step")),
        ("loss", _class_of(model.get("loss"))),
        ("optimizer", f"{_class_of(optimizer)}{f', lr {rate}' if rate is not None else ''}"),
        ("schedule", _class_of(model.get("scheduler"))),
        ("batch size per device", data.get("batch_size")),
        ("crop", data.get("crop_size")),
        ("seed", run.config.get("seed_everything")),
        ("scale equalization", run.scales.get("mode")),
        ("initialized from", model.get("weights")),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def _limits(run: Run, item: Evaluation | None) -> list[str]:
    """What the run's own files say that the model cannot do, or nobody knows."""
    seed = run.config.get("seed_everything")
    found = [
        f"One training{'' if seed is None else f', seed {seed}'}: the intervals are over images and"
        " do not say how another training would end.",
        "Measured on images of the same source as the training's. Other cameras, places or seasons"
        " were not looked at.",
    ]
    if item is None:
        return ["The model was not evaluated.", *found]
    rows = item.results["classes"]
    absent = [row["name"] for row in rows if row["IoU"] is None]
    weak = [row["name"] for row in rows if row["IoU"] is not None and row["IoU"] < WEAK]
    if absent:
        found.append(f"Not in the evaluated images, hence unknown: {', '.join(absent)}.")
    if weak:
        found.append(f"IoU below {100 * WEAK:.0f} %: {', '.join(weak)}.")
    wide = item.intervals.get(("mIoU", ""))
    if wide is not None and isfinite(wide.low):
        span = 100 * (wide.high - wide.low)
        found.append(f"The 95 % interval of mIoU is {span:.1f} points wide.")
    if not item.intervals:
        found.append("There are no intervals: fewer than two images, or no intervals.csv.")
    if item.split == "val":
        found.append("The figures are of the images by which the checkpoint was chosen.")
    return found
