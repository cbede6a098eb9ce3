"""What the tests of the command line share: a tiny experiment and how to run it."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_experiment import TINY

"""Two epochs of two steps, each a few milliseconds; 8 classes."""


def _run(*args: object) -> None:
    """The user's command line, in this process."""
    from seglab.cli import main

    with warnings.catch_warnings():
        main([str(arg) for arg in args])


def _logged(run_folder: Path, key: str) -> list[float]:
    """One column of a run's metrics.csv, without its empty cells."""
    with (run_folder / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


@pytest.fixture(autouse=True)
def no_seed_of_an_earlier_test() -> None:
    """Lightning keeps the last seed in the environment, and data modules take it from there."""
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(scope="session")
def run() -> Callable[..., None]:
    """Run a command line: `run("fit", "--config", path)`."""
    return _run


@pytest.fixture(scope="session")
def logged() -> Callable[[Path, str], list[float]]:
    """Read one column of a run's metrics.csv: `logged(folder, "val/mIoU")`."""
    return _logged


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the tiny config."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def fitted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the tiny config."""
    root = tmp_path_factory.mktemp("runs")
    _run("fit", "--config", tiny, "--trainer.default_root_dir", root)
    return root / "tiny" / "version_0"


@pytest.fixture
def fit(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run `fit` on the tiny config with more arguments; returns the run's folder."""

    def fit(*args: object) -> Path:
        _run("fit", "--config", tiny, "--trainer.default_root_dir", tmp_path, *args)
        return sorted((tmp_path / "tiny").iterdir())[-1]

    return fit
