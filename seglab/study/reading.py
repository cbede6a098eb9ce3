"""Read a study's plan and what its runs have left, and note what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from seglab.sentences import listed
from seglab.study.pairs import METRICS, Runs
from seglab.study.plan import FILE_NAME, MARGIN
from seglab.study.records import Record, read_records


@dataclass(frozen=True)
class StudyRuns:
    """A study as far as it has come.

    Attributes:
        arms: Planned names, the control first.
        seeds: Planned seeds.
        treatment: Arm of the primary comparison.
        control: The arm that all others are compared with.
        metric: Of the primary comparison, one of `METRICS`.
        compared: What must be equal for runs to be a pair; None for all that was recorded.
        runs: Ended runs that were planned.
        margin: Difference in points that would matter, as planned.
        remarks: What a reader must know about runs that are missing, failed or not planned.
    """

    folder: Path
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    treatment: str
    control: str
    metric: str
    compared: tuple[str, ...] | None
    runs: Runs
    remarks: tuple[str, ...]
    margin: float = MARGIN

    @property
    def missing(self) -> list[tuple[str, int]]:
        """Planned runs that have not ended."""
        planned = [(arm, seed) for seed in self.seeds for arm in self.arms]
        return [run for run in planned if run not in self.runs]

    @property
    def failed(self) -> list[Record]:
        """Runs that ended by an error."""
        return [record for record in self.runs.values() if record.status != "finished"]


def read_study(folder: Path) -> StudyRuns:
    """Read a study's folder, whether or not all runs have ended.

    Raises:
        ValueError: There is no plan, or it names no comparison that could be made.
    """
    plan = _read_plan(folder)
    treatment, control, metric = _primary(plan, folder)
    arms = (control, *(arm for arm in plan["arms"] if arm != control))
    seeds = tuple(int(seed) for seed in plan["seeds"])
    planned = {(arm, seed) for arm in arms for seed in seeds}
    found = {(record.arm, record.seed): record for record in read_records(folder)}
    compared = (plan.get("pairing") or {}).get("compared")
    study = StudyRuns(
        folder, arms, seeds, treatment, control, metric,
        None if compared is None else tuple(compared),
        {run: record for run, record in found.items() if run in planned},
        (), float((plan.get("power") or {}).get("margin", MARGIN)),
    )  # fmt: skip
    remarks = [*_remarks(study), *_of_plan(plan), *_unplanned(sorted(found.keys() - planned))]
    return StudyRuns(**{**vars(study), "remarks": tuple(remarks)})


def _read_plan(folder: Path) -> dict[str, Any]:
    path = folder / FILE_NAME
    if not path.exists():
        raise ValueError(f"{folder} holds no {FILE_NAME}: name the folder of a study")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    plan = content if isinstance(content, dict) else {}
    if len(plan.get("arms") or ()) == 1:
        raise ValueError(f"{path} plans one arm: there is nothing to compare")
    missing = [key for key in ("arms", "seeds", "primary") if not plan.get(key)]
    if missing:
        raise ValueError(f"{path} lacks {' and '.join(missing)}: a plan names arms, seeds, primary")
    return plan


def _primary(plan: dict[str, Any], folder: Path) -> tuple[str, str, str]:
    """Treatment, control and metric of the primary comparison."""
    primary = plan["primary"]
    treatment, control = primary.get("arm"), primary.get("reference")
    for what, arm in (("arm", treatment), ("reference", control)):
        if arm not in plan["arms"]:
            raise ValueError(
                f"the primary {what} of {folder / FILE_NAME} is {arm!r}, which is none of its arms:"
                f" {', '.join(map(str, plan['arms']))}"
            )
    if treatment == control:
        raise ValueError(f"{folder / FILE_NAME} compares {treatment!r} with itself: name two arms")
    metric, *_ = str(primary.get("metric", "final")).split() or ["nothing"]
    if metric not in METRICS:
        raise ValueError(
            f"the metric of {folder / FILE_NAME} begins with {metric!r}, but must with one of"
            f" {', '.join(METRICS)}"
        )
    return treatment, control, metric


def _remarks(study: StudyRuns) -> list[str]:
    n_planned, remarks = len(study.arms) * len(study.seeds), []
    if study.missing:
        names = listed([f"{arm} {seed}" for arm, seed in study.missing], 6)
        remarks.append(
            f"Planned runs that have not ended: {len(study.missing)} of {n_planned} ({names}). All"
            " figures are preliminary. To look early and to stop when one likes what one sees"
            " makes false positives."
        )
    remarks += [
        f"{run.arm} failed with seed {run.seed}: {run.error or 'no error was recorded'}"
        for run in study.failed
    ]
    if len(study.seeds) == 1:
        remarks.append("One seed: nothing here says what other seeds would give.")
    return remarks


def _of_plan(plan: dict[str, Any]) -> list[str]:
    left_out = (plan.get("pairing") or {}).get("left_out") or {}
    remarks = [f"{what} of the arms: {reason}" for what, reason in left_out.items()]
    return remarks + [
        f"The plan was changed on {change.get('time')}: {change.get('what')}. Seeds added after a"
        " look at the results make false positives."
        for change in plan.get("amendments") or ()
    ]


def _unplanned(runs: Sequence[tuple[str, int]]) -> list[str]:
    names = listed([f"{arm} {seed}" for arm, seed in runs], 6)
    return [f"Not in the plan, hence left out: {names}."] if runs else []
