"""The end of a run: checked against its partners, then written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from seglab.study.records import FILE_NAME as RECORD
from seglab.study.records import Record, read_record, run_folder


def ended_runs(study: Path, runs: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Record]:
    """Records of those runs that have ended."""
    folders = {run: run_folder(study, *run) for run in runs}
    return {run: read_record(path) for run, path in folders.items() if (path / RECORD).is_file()}


def end_run(study: Path, record: Record, arms: Sequence[str], compared: Sequence[str]) -> Record:
    """Write a record; a run that does not pair with those of its seed has failed.

    Args:
        study: Folder of the study.
        record: Of the run.
        arms: All arms of the study.
        compared: What must be equal in all arms of a seed.

    Returns:
        What was written.
    """
    if record.status == "finished":
        partners = ended_runs(study, [(arm, record.seed) for arm in arms if arm != record.arm])
        error = _mismatch(record, partners, compared)
        if error:
            record = replace(record, status="failed", error=error)
    record.write(run_folder(study, record.arm, record.seed))
    return record


def _mismatch(
    record: Record, partners: Mapping[tuple[str, int], Record], compared: Sequence[str]
) -> str:
    for (arm, seed), partner in partners.items():
        for what in compared if partner.status == "finished" else ():
            ours, theirs = record.pairing.get(what, ""), partner.pairing.get(what, "")
            if ours != theirs:
                return (
                    f"the {what} are not those of arm {arm} with seed {seed} (sha256 {ours[:12]}"
                    f" and {theirs[:12]}), so the two runs are no pair: see what else the arm"
                    " changes, or what the run takes from elsewhere than its config and seed."
                )
    return ""
