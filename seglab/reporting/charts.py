"""Charts of a run, by matplotlib: as SVG for pages, as pixels for files and loggers.

Matplotlib is an extra. Figures are drawn without pyplot, so that no window system and no global
state is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seglab.visualize import Pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER = "#1b1f24", "#59636e", "#d1d9e0", "#fffffe"
SERIES = ("#2563c9", "#c2540a", "#14804a", "#a1309c", "#8a6a00", "#c0283c", "#0a7f8c", "#6b55c9")
"""Colours; pages replace them by colours of their theme."""
DASHES = ("-", "--", ":")

MOST_LINES = 12  # classes that are told apart as lines; more are drawn as a map
MOST_BARS = 60
_WIDTH, _DPI = 5.6, 120  # inches, pixels per inch

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Steps and values, by name."""


def is_available() -> bool:
    """Whether charts can be drawn."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


MISSING = "the package matplotlib is not installed, charts need it: pip install matplotlib"


def lines(series: Series, label: str, height: float = 2.8) -> Figure:
    """One line per name over the steps.

    Args:
        series: What to draw; a single value is drawn as a point.
        label: Of the vertical axis.
        height: Inches.
    """
    figure, axes = _figure(height)
    for number, (name, (steps, values)) in enumerate(series.items()):
        color, dash = SERIES[number % len(SERIES)], DASHES[number // len(SERIES) % len(DASHES)]
        marker = "o" if len(steps) <= 12 else None
        axes.plot(steps, values, dash, color=color, marker=marker, markersize=3.5, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if len(series) > 1:
        _legend_above(figure, list(series))
    return figure


def class_lines(steps: Sequence[float], iou: ArrayLike, names: Sequence[str]) -> Figure:
    """IoU of each class over the steps: lines, or a map where the classes are many.

    Args:
        steps: Of S validations.
        iou: Fractions (S, K), NaN where a class is absent.
        names: K.
    """
    values = 100 * np.asarray(iou, float)
    if len(names) <= MOST_LINES:
        series = {name: (steps, values[:, k].tolist()) for k, name in enumerate(names)}
        figure = lines(series, "IoU, %", 3.2)
        figure.axes[0].set_ylim(0, 100)
        return figure
    return _class_map(steps, values, names)


def _class_map(steps: Sequence[float], values: NDArray[np.float64], names: Sequence[str]) -> Figure:
    figure, axes = _figure(min(14.0, 1 + 0.16 * len(names)), grid=False)
    drawn = axes.imshow(
        values.T, aspect="auto", interpolation="nearest", vmin=0, vmax=100, cmap="viridis"
    )
    shown = np.unique(np.linspace(0, len(steps) - 1, min(6, len(steps))).round().astype(int))
    axes.set_xticks(shown, [f"{steps[index]:g}" for index in shown])
    every = -(-len(names) // 80)
    axes.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    axes.set_xlabel("step")
    bar = figure.colorbar(drawn, ax=axes, label="IoU, %", pad=0.02)
    bar.outline.set_visible(False)
    return figure


def class_bars(
    names: Sequence[str], values: Sequence[float], ends: Sequence[tuple[float, float]] | None
) -> Figure:
    """One bar per class, in percent, with its interval.

    Args:
        names: K.
        values: Fractions, NaN for absent classes.
        ends: Lower and upper end of each interval, or None.
    """
    order = np.argsort(np.nan_to_num(values, nan=-1))[-MOST_BARS:]
    chosen = [100 * values[index] for index in order]
    figure, axes = _bars([_short(names[index]) for index in order], chosen, SERIES[0])
    if ends is not None:
        spans = 100 * np.array([ends[index] for index in order])
        middle = np.array(chosen)[:, None]
        lengths = np.abs(spans - middle).T
        axes.errorbar(
            chosen, range(len(order)), xerr=lengths, fmt="none", ecolor=INK, elinewidth=1.2
        )
    axes.set_xlim(0, 100)
    axes.set_xlabel("IoU, %")
    return figure


def scale_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Standard deviation of every branch before equalization, one bar each, grouped by fusion.

    Args:
        rows: `fusion`, `branch`, `from`, `std` and `scale`, as `scale_rows` returns.
    """
    rows = rows[:MOST_BARS][::-1]
    fusions = list(dict.fromkeys(row["fusion"] for row in rows[::-1]))
    colors = [SERIES[fusions.index(row["fusion"]) % len(SERIES)] for row in rows]
    names = [f"{_short(row['from'].removeprefix('network.'))}  {row['branch']}" for row in rows]
    figure, axes = _bars(names, [row["std"] for row in rows], colors)
    for place, row in enumerate(rows):
        axes.annotate(
            f"x {row['scale']:.3g}", (row["std"], place), (4, 0), textcoords="offset points",
            va="center", fontsize=8, color=MUTED,
        )  # fmt: skip
    axes.margins(x=0.14)
    axes.set_xlabel("standard deviation (x: factor on the weights)")
    if len(fusions) > 1:
        handles = [
            _patch(SERIES[number % len(SERIES)], name) for number, name in enumerate(fusions)
        ]
        figure.legend(
            handles=handles, loc="outside upper left", frameon=False, labelcolor=INK, fontsize=8
        )
    return figure


def _bars(names: Sequence[str], values: Sequence[float], color: Any) -> tuple[Figure, Axes]:
    figure, axes = _figure(0.9 + 0.24 * max(len(names), 2))
    axes.barh(range(len(names)), np.nan_to_num(values), color=color, height=0.62)
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", visible=False)
    axes.set_ylim(-0.6, len(names) - 0.4)
    return figure, axes


def _short(name: str, longest: int = 34) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def _patch(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)


def _figure(height: float, grid: bool = True) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH, height), dpi=_DPI, layout="constrained", facecolor=PAPER)
    axes = figure.add_subplot(facecolor=PAPER)
    axes.tick_params(colors=MUTED, labelsize=9, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    if grid:
        axes.grid(color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, axes


def _legend_above(figure: Figure, names: Sequence[str]) -> None:
    n_columns = max(1, min(len(names), 84 // (max(map(len, names)) + 8)))
    figure.legend(
        loc="outside upper left", ncols=n_columns, frameon=False, labelcolor=INK, fontsize=9
    )


def to_pixels(figure: Figure) -> Pixels:
    """Draw a figure as uint8 RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def scale_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Branches and summands of a scale_equalization.json, by one set of names.

    Args:
        report: What `scale_equalization.Report.to_dict` returned.

    Returns:
        For each `fusion`, `branch`, `from` (the module that made the map), `upsampling`, `mean`,
        `std`, `scale` and `note`.
    """
    rows = [
        {
            "fusion": row["fusion"], "branch": str(row["branch"]), "from": _source(row),
            "upsampling": row.get("upsampling"), "mean": row["mean"], "std": row["std"],
            "scale": row["scale"], "note": row.get("note", ""),
        }
        for row in report.get("rows", ())
    ]  # fmt: skip
    rows += [
        {
            "fusion": f"{item['name']} (sum)", "branch": str(index), "from": summand["source"],
            "upsampling": None, "mean": summand["mean"], "std": summand["std"],
            "scale": summand["scale"], "note": "",
        }
        for item in report.get("sums", ())
        for index, summand in enumerate(item["summands"])
    ]  # fmt: skip
    return rows


def _source(row: Mapping[str, Any]) -> str:
    return str(row.get("source") or row.get("from") or f"channels {row['start']}:{row['stop']}")
