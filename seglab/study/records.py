"""What one run of a study leaves in its folder, and how it is read again.

A study's folder:

    plan.yaml                    written before the first run
    runs/ARM/seed_N/run.json     a `Record`, written whole when the run has ended
    runs/ARM/seed_N/counts.npz   per validation image: `names` (n,), `counts` (n, 3, K) int64 of the
                                 last validation: hits, labelled and predicted pixels of each class
    runs/ARM/seed_N/mechanism.csv  step, fusion, branch, std, share, gradient, update
    study.json study.csv study.md study.html   the analysis
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FILE_NAME = "run.json"


@dataclass(frozen=True)
class Record:
    """One ended run.

    Attributes:
        arm: Name of what was varied.
        seed: Seed that it shares with the runs of the other arms.
        status: "failed" runs have an error and whatever else was known by then.
        error: One sentence; empty for a finished run.
        seconds: Wall-clock time.
        pairing: What must be equal in all arms of a seed, by name ("initial weights", "training
            data"): hexadecimal digests.
        curve: (step, mIoU as a fraction) of every validation, in order of steps.
        per_class: IoU of each class, as a fraction, in the last validation; None if absent.
        environment: Versions, device, threads.
    """

    arm: str
    seed: int
    status: Literal["finished", "failed"]
    error: str = ""
    seconds: float = 0.0
    pairing: Mapping[str, str] = field(default_factory=dict)
    curve: tuple[tuple[int, float], ...] = ()
    per_class: Mapping[str, float | None] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> float:
        """The mIoU of the last validation, as a fraction."""
        return self.curve[-1][1]

    @property
    def best(self) -> float:
        """The largest mIoU of all validations, as a fraction."""
        return max(value for _, value in self.curve)

    def write(self, folder: Path) -> None:
        """Write `run.json`, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE_NAME, json.dumps(asdict(self), indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def run_folder(study: Path, arm: str, seed: int) -> Path:
    """Where a run of a study is."""
    return study / "runs" / arm / f"seed_{seed}"


def read_record(folder: Path) -> Record:
    """Read what `Record.write` wrote.

    Raises:
        ValueError: The file is no whole record, as after a full disk.
    """
    path = folder / FILE_NAME
    try:
        return parse_record(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): remove {folder}, and `study --resume` does that run"
            " again"
        ) from error


def parse_record(text: str) -> Record:
    """A record from JSON."""
    values = json.loads(text)
    values["curve"] = tuple((int(step), float(value)) for step, value in values["curve"])
    return Record(**values)


def read_records(study: Path) -> Iterator[Record]:
    """All ended runs of a study."""
    for path in sorted(study.glob(f"runs/*/seed_*/{FILE_NAME}")):
        yield read_record(path.parent)
