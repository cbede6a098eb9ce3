"""mechanism.csv: what `ScaleMonitor` saw of each branch, one row per measurement and branch."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

FILE_NAME = "mechanism.csv"
PREFIX = "scale_monitor/"
MEASURES = ("std", "share", "gradient", "update")


class MechanismTable(Logger):
    """A logger that takes the monitor's figures and passes over all others.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / FILE_NAME
        self._rows: dict[tuple[int, str, int], dict[str, float]] = {}

    @property
    def name(self) -> str:
        """None is needed."""
        return ""

    @property
    def version(self) -> str:
        """None is needed."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: config.yaml has them all."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Put the figures of a step into the rows of their branches."""
        for key, value in metrics.items():
            if key.startswith(PREFIX):
                fusion, branch, measure = key.removeprefix(PREFIX).rsplit("/", 2)
                row = self._rows.setdefault((step or 0, fusion, int(branch)), {})
                row[measure] = float(value)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the file."""
        if not self._rows:
            return
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "fusion", "branch", *MEASURES])
            for place, values in sorted(self._rows.items()):
                writer.writerow([*place, *(values.get(measure, "") for measure in MEASURES)])
