"""What the tests of the command line share: a tiny experiment and how to run it."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

TINY = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
    "data": {
        "class_path": "seglab.data.ScenesDataModule",
        "init_args": {
            "size": 32,
            "train_length": 8,
            "val_length": 5,
            "batch_size": 4,
            "num_workers": 0,
        },
    },
    "model": {
        "network": {
            "class_path": "seglab.models.Segmenter",
            "init_args": {
                "encoder": {
                    "class_path": "seglab.models.TimmEncoder",
                    "init_args": {"name": "test_resnet"},
                },
                "head": {
                    "class_path": "seglab.models.heads.UPerHead",
                    "init_args": {"channels": 8},
                },
            },
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
        "scheduler": {"class_path": "seglab.optim.WarmupPolyLR"},
    },
    "scale_equalization": {"max_batches": 2, "verbose": False},
}
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
