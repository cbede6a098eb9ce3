"""One HTML page about one run or several, with everything inside: open it anywhere, mail it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seglab.reporting.charts import MISSING, is_available
from seglab.reporting.pages.card import write_card
from seglab.reporting.pages.run_files import ReportError, Run, read_run
from seglab.reporting.pages.templates import HERE, templates
from seglab.reporting.pages.views import view_run


def write_report(
    folders: Sequence[Path], output: Path, card: Path | None = None, program: str = "seglab"
) -> None:
    """Write a page about runs; and a model card of the first.

    Args:
        folders: Of runs, `logs/.../version_N`, or of evaluations; each once.
        output: The page.
        card: The model card; None writes none.
        program: How commands begin that the page proposes.

    Raises:
        ReportError: Matplotlib is missing, a folder is no run's, or is given twice.
    """
    if not is_available():
        raise ReportError(MISSING)
    places = [folder.resolve() for folder in folders]
    twice = [str(place) for place in places if places.count(place) > 1]
    if twice:
        raise ReportError(f"{twice[0]} is given twice: give each run once")
    runs = [read_run(folder) for folder in folders]
    page = render(runs, program)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    if card is not None:
        write_card(runs[0], card, program)


def render(runs: Sequence[Run], program: str) -> str:
    """The page as text."""
    names = _names(runs)
    views = [view_run(run, f"r{number}", program) for number, run in enumerate(runs)]
    for view, name in zip(views, names, strict=True):
        view["name"] = name
    compared = _compared(runs, names) if len(runs) > 1 else None
    return str(
        templates().get_template("page.html").render(
            runs=views, compared=compared, title=" · ".join(names[:3]), css=_css(), names=names
        )
    )  # fmt: skip


def _compared(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    from seglab.reporting.pages.compared_view import view_comparison  # loads torch

    return view_comparison(runs, names)


def _names(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart; the whole path where two are called alike."""
    names = [run.name for run in runs]
    return [str(r.folder) if names.count(n) > 1 else n for r, n in zip(runs, names, strict=True)]


def _css() -> str:
    return (HERE / "page.css").read_text(encoding="utf-8")
