"""Draw a study: learning curves, pairs, differences, mechanism. Needs matplotlib."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from seglab.study.disequilibrium import QUANTITIES, Traces
from seglab.study.findings import Analysis
from seglab.study.pairs import POINTS, figure
from seglab.study.records import Record
from seglab.study.tables import NAMES, comparison_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROL = "#8a8a8a"
COLORS = ("#0a7cc4", "#d95f02", "#1b9e77", "#c75a9b", "#a6761d", "#7570b3")
"""Dark enough on white, light enough on black."""
INK = "#1f2328"
"""Of text and axes; in a page it follows the reader's light or dark style."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "study",  # the same picture gives the same file
    "font.size": 9,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **{f"{name}.color": INK for name in ("text", "xtick", "ytick")},
    **{f"axes.{name}": INK for name in ("edgecolor", "labelcolor", "titlecolor")},
}
LABELS = {
    "std": "branch std",
    "share": "share of variance",
    "gradient": "gradient, rms",
    "update": "relative update",
}


@dataclass(frozen=True)
class Picture:
    """A drawing as SVG.

    Attributes:
        name: Of its file, without an ending.
        title: One line about what it shows.
        svg: The whole file, on white.
    """

    name: str
    title: str
    svg: str

    @property
    def inline(self) -> str:
        """The drawing for a page: transparent, its ink that of the text around, ids of its own."""
        svg = self.svg[self.svg.index("<svg") :].replace(INK, "currentColor")
        svg = re.sub(r'(<g id="patch_1">\s*<path [^>]*style="fill: )#ffffff', r"\1none", svg)
        prefix = re.sub(r"\W", "-", self.name)
        svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
        svg = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\1{prefix}-", svg)
        return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(self.title)}" ', 1)


def pictures(found: Analysis) -> list[Picture]:
    """All pictures for which there is something to draw.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        return list(_draw(found))


def _draw(found: Analysis) -> Iterator[Picture]:
    done = _finished(found)
    if not done:
        return
    yield _picture(draw_curves(done, found), "curves", "Learning curves: mean and deviation")
    metric = NAMES[found.study.metric]
    yield _picture(draw_pairs(found), "pairs", f"Pairs of one seed joined: {metric}")
    if any(c.n_pairs for c in found.comparisons):
        title = "Mean differences, 95 % intervals, and the margin"
        yield _picture(draw_differences(found), "differences", title)
    for index, fusion in enumerate(dict.fromkeys(each.fusion for each in found.traces)):
        traces = [each for each in found.traces if each.fusion == fusion]
        title = f"Mechanism at {fusion}: medians over seeds"
        yield _picture(draw_mechanism(traces, found), f"mechanism_{index}", title)


def draw_curves(done: Mapping[str, Sequence[Record]], found: Analysis) -> Figure:
    """Mean mIoU over the steps that all runs of an arm share, with a band of one deviation."""
    picture, axes = _axes(7.5, 3.6)
    for arm, records in done.items():
        shared = set.intersection(*({step for step, _ in run.curve} for run in records))
        steps = sorted(shared)
        values = POINTS * np.array([[dict(run.curve)[step] for step in steps] for run in records])
        mean, color = values.mean(0), _color(found, arm)
        place = found.study.arms.index(arm)
        axes.plot(
            steps, mean, color=color, label=arm, linewidth=1.5, linestyle=_line_style(place - 1),
            marker="o" if len(steps) == 1 else None,  # a line of one point is not seen
        )  # fmt: skip
        if len(records) > 1:
            deviation = values.std(0, ddof=1)
            axes.fill_between(
                steps, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0
            )
    axes.set(xlabel="step", ylabel="mIoU, %")
    axes.legend()
    return picture


def draw_pairs(found: Analysis) -> Figure:
    """One line per seed through all arms; the mean of each arm as a bar."""
    study = found.study
    picture, axes = _axes(7.5, 3.6)
    values = np.array(
        [[figure(study.runs.get((a, s)), study.metric) for a in study.arms] for s in study.seeds]
    )
    for row in values:
        axes.plot(row, color=CONTROL, linewidth=0.8, alpha=0.7, zorder=1)
    for place, arm in enumerate(study.arms):
        column = values[:, place][np.isfinite(values[:, place])]
        axes.scatter([place] * len(column), column, s=16, color=_color(found, arm), zorder=2)
        if len(column):
            axes.hlines(column.mean(), place - 0.2, place + 0.2, color=_color(found, arm), lw=2.5)
    is_long = sum(map(len, study.arms)) > 80  # characters in a row that do not overlap
    slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_long else {}
    axes.set_xticks(range(len(study.arms)), study.arms, **slant)
    axes.set(ylabel=f"{NAMES[study.metric]}, %", xlim=(-0.5, len(study.arms) - 0.5))
    return picture


def draw_differences(found: Analysis) -> Figure:
    """Every comparison of the primary metric: its seeds, its mean and interval, and the margin."""
    chosen = [c for c in found.comparisons if c.pairs.metric == found.study.metric and c.n_pairs]
    picture, axes = _axes(7.5, 1 + 0.38 * len(chosen))
    axes.axvspan(-found.margin, found.margin, color=CONTROL, alpha=0.15, linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, each in enumerate(chosen):
        color = COLORS[0] if each.primary else CONTROL
        places = [place] * each.n_pairs
        axes.scatter(each.pairs.differences, places, s=12, color=color, alpha=0.45, linewidth=0)
        low, high = each.t_interval or (each.mean, each.mean)
        axes.hlines(place, low, high, color=color, linewidth=2)
        axes.plot(each.mean, place, "o", color=color, markersize=6)
    labels = [comparison_name(c) + (", primary" if c.primary else "") for c in chosen]
    axes.set_yticks(range(len(chosen)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"points of {NAMES[found.study.metric]}; shaded: within the margin")
    return picture


def draw_mechanism(traces: Sequence[Traces], found: Analysis) -> Figure:
    """One fusion: quantities below each other, arms side by side, one line per branch."""
    from matplotlib.figure import Figure

    arms = [arm for arm in found.study.arms if any(each.arm == arm for each in traces)]
    shown = [q for q in QUANTITIES if any(np.isfinite(t.values[q]).any() for t in traces)]
    size = (0.9 + 1.9 * len(arms), 0.8 + 1.5 * len(shown))
    picture = Figure(figsize=size, layout="constrained")
    grid = picture.subplots(len(shown), len(arms), sharex=True, sharey="row", squeeze=False)
    for axes_of_quantity, quantity in zip(grid, shown, strict=True):
        for axes, arm in zip(axes_of_quantity, arms, strict=True):
            _plot_branches(axes, [each for each in traces if each.arm == arm], quantity)
        axes_of_quantity[0].set_ylabel(LABELS[quantity])
    for axes, arm in zip(grid[0], arms, strict=True):
        axes.set_title(arm)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    lines = {line.get_label(): line for axes in grid[0] for line in axes.get_lines()}
    picture.legend(handles=[*lines.values()], loc="outside lower center", ncols=min(6, len(lines)))
    return picture


def _plot_branches(axes: Any, traces: Sequence[Traces], quantity: str) -> None:
    """Median over the seeds, at the steps that all of them measured."""
    steps = sorted(set.intersection(*({int(s) for s in each.steps} for each in traces)))
    values = np.array([t.values[quantity][np.isin(t.steps, steps)] for t in traces])
    for index, branch in enumerate(traces[0].branches):
        column = np.median(values[:, :, index], 0)
        kept = np.isfinite(column)
        color = COLORS[index % len(COLORS)]
        marks = {"marker": "o", "markersize": 2.5} if kept.sum() < 30 else {}
        axes.plot(
            np.array(steps)[kept], column[kept], color=color, label=f"branch {branch}",
            linestyle=_line_style(index), linewidth=1.2, **marks,
        )  # fmt: skip
    positive = values[np.isfinite(values)]
    if quantity != "share" and len(positive) and (positive > 0).all():
        axes.set_yscale("log")


def _finished(found: Analysis) -> dict[str, list[Record]]:
    """Finished runs that were validated, by arm, in the order of the arms."""
    runs = {
        arm: [
            record
            for (name, _), record in found.study.runs.items()
            if name == arm and record.status == "finished" and record.curve
        ]
        for arm in found.study.arms
    }
    return {arm: members for arm, members in runs.items() if members}


def _color(found: Analysis, arm: str) -> str:
    others = [a for a in found.study.arms if a != found.study.control]
    return CONTROL if arm not in others else COLORS[others.index(arm) % len(COLORS)]


def _line_style(index: int) -> str:
    """Tells lines apart whose colours are the same again; the control's index may be -1."""
    return ("-", "--", ":")[max(index, 0) // len(COLORS) % 3]


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    return picture, picture.subplots()


def _picture(drawn: Figure, name: str, title: str) -> Picture:
    text = io.StringIO()
    drawn.savefig(text, format="svg", facecolor="#ffffff", metadata={"Date": None})
    return Picture(name, title, text.getvalue())
