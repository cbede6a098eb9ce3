"""metrics.csv: one row per step, the useful columns first; equalization figures in a file apart."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

FIRST = (
    r"step|epoch",
    r"lr(/pg1)?",
    r"train/loss",
    r"val/loss|val/mIoU|val/mAcc|val/aAcc|val/mDice|val/mPrecision|val/fwIoU",
    r"test/loss|test/mIoU|test/mAcc|test/aAcc|test/mDice|test/mPrecision|test/fwIoU",
    r"(?!.*IoU/)(?!lr/).*",  # whatever else, before the classes and the groups' rates
    r"lr/.*",
)
"""Columns from left to right; the rest follows as it came."""

EQUALIZATION = "scale_equalization/"


class Table:
    """A CSV file that grows by rows, and is written anew when it grows by columns.

    Args:
        path: The file; read if it is there.
        n_steps: Rows of this step and later ones are dropped: they were logged by a run that went
            on after its last checkpoint.
    """

    def __init__(self, path: Path, n_steps: int = 0) -> None:
        self.path = path
        self.columns: list[str] = ["step"]
        self.rows: list[dict[str, Any]] = []
        self._n_written: int | None = None  # rows of the file; None if it is to be written anew
        if path.is_file() and n_steps:
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns = list(reader.fieldnames or self.columns)
                rows = [{key: text for key, text in row.items() if text} for row in reader]
            self.rows = [row for row in rows if int(row["step"]) < n_steps]

    def add(self, values: Mapping[str, Any], step: int) -> None:
        """Put values into the row of a step."""
        if not self.rows or int(self.rows[-1]["step"]) != step:
            self.write()  # the row before is complete
            self.rows.append({"step": step})
        self.rows[-1] |= values
        if self._n_written == len(self.rows) or not set(values) <= set(self.columns):
            self._n_written = None
        new = [key for key in values if key not in self.columns]
        self.columns = sorted([*self.columns, *new], key=_place)

    def write(self) -> None:
        """Bring the file up to date."""
        if self._n_written == len(self.rows) or not self.rows:
            return
        if self._n_written is None:
            partial = self.path.with_name(f"{self.path.name}.partial")
            self._write_to(partial, "w", self.rows)
            partial.replace(self.path)
        else:
            self._write_to(self.path, "a", self.rows[self._n_written :])
        self._n_written = len(self.rows)

    def _write_to(self, path: Path, mode: str, rows: list[dict[str, Any]]) -> None:
        with path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


def _place(column: str) -> int:
    found = (i for i, pattern in enumerate(FIRST) if re.fullmatch(pattern, column))
    return next(found, len(FIRST))


class MetricsTable(CSVLogger):
    """Lightning's CSV logger with a file that people can read.

    Args:
        folder: Of the run.
        n_steps: Steps that are done when a run is continued; its rows are kept.
    """

    def __init__(self, folder: Path, n_steps: int = 0) -> None:
        super().__init__(folder.parent, name="", version=folder.name)
        self._metrics = Table(folder / "metrics.csv", n_steps)
        self._equalization = Table(folder / "scale_equalization.csv", n_steps)

    @property
    def experiment(self) -> Any:
        """The logger itself: there is no writer behind it."""
        return self

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: config.yaml has them all."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Sort figures into the tables."""
        values = {_column(key): getattr(v, "item", lambda v=v: v)() for key, v in metrics.items()}
        figures = {key: values.pop(key) for key in list(values) if key.startswith(EQUALIZATION)}
        if figures:
            self._equalization.add(figures, step or 0)
        if values.keys() - {"epoch"}:
            self._metrics.add(_whole_epoch(values), step or 0)

    @rank_zero_only
    def save(self) -> None:
        """Write what has been logged."""
        self._metrics.write()
        self._equalization.write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """As `save`."""
        self.save()


def _column(name: str) -> str:
    """Lightning names learning rates after the optimizer: lr-SGD, lr-AdamW/pg1."""
    return re.sub(r"^lr-\w+", "lr", name)


def _whole_epoch(values: dict[str, Any]) -> dict[str, Any]:
    return values | ({"epoch": int(values["epoch"])} if "epoch" in values else {})
