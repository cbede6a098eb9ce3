"""Compare the arms of a study: `python -m seglab.study.analysis STUDY [--margin POINTS]`.

Writes study.json, study.csv, study.md, study.html and pictures/ into the study's folder, as far as
the study has come.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from pathlib import Path

from seglab.study.files import write_files
from seglab.study.findings import Analysis, compute
from seglab.study.pages import console, write_pages
from seglab.study.reading import read_study


def analyze(folder: str | Path, margin: float | None = None) -> Analysis:
    """Compare the arms of a study and write what was found into its folder.

    Args:
        folder: Of the study; it need not be finished.
        margin: Difference in points of mIoU that would matter: arms are called equivalent if they
            are shown to differ by less; None for that of the plan, or 0.2.

    Raises:
        ValueError: The folder holds no plan, the plan names no comparison that could be made, or
            `margin` is not positive.
    """
    study = read_study(Path(folder))
    margin = study.margin if margin is None else margin
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin is {margin}, but must be a positive number of points of mIoU")
    found = compute(study, margin)
    write_files(found)
    write_pages(found)
    return found


def main(args: list[str] | None = None) -> None:
    """Analyze the study that a command line names."""
    parser = ArgumentParser(
        prog="python -m seglab.study.analysis", description=str(analyze.__doc__).partition("\n")[0]
    )
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("--margin", type=float, help="points that matter; the plan's if none")
    options = parser.parse_args(args)
    print(console(analyze(options.study, options.margin)))


if __name__ == "__main__":
    main()
