"""A study in this process: `study(FOLDER, *args)`, on the tiny config without equalization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

RATES = {"slow": {"model": {"optimizer": {"init_args": {"lr": 0.01}}}}, "fast": {}}


@pytest.fixture
def arms(tmp_path: Path) -> Callable[..., Path]:
    """Write an arms file; two learning rates if none are given."""

    def write(**arms: object) -> Path:
        path = tmp_path / "arms.yaml"
        path.write_text(yaml.safe_dump(arms or RATES))
        return path

    return write


@pytest.fixture
def study(run: Callable[..., None], tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run a new study; returns its folder."""

    def start(*args: object) -> Path:
        run("study", "--config", tiny, "--output", tmp_path / "study", *args)
        return tmp_path / "study"

    return start


@pytest.fixture
def resume(run: Callable[..., None]) -> Callable[..., None]:
    """Continue a study: `resume(FOLDER, *args)`."""

    def go_on(folder: Path, *args: object) -> None:
        run("study", "--resume", folder, *args)

    return go_on
