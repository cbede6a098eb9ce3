"""Two processes on the CPU, as `--trainer.devices 2 --trainer.strategy ddp` starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DDP = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
SPY = """
from lightning.pytorch import Callback
import torch

class Spy(Callback):
    def __init__(self, folder: str) -> None:
        self.folder, self.names = folder, []

    def on_train_batch_start(self, trainer, task, batch, index):
        self.names += batch["name"]

    def on_train_end(self, trainer, task):
        content = {"weights": task.network.state_dict(), "names": self.names}
        torch.save(content, f"{self.folder}/rank{trainer.global_rank}.pt")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run train.py as a user does; returns what it printed."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "spy.py").write_text(SPY)
    environment = {**os.environ, "PYTHONPATH": str(modules), "OMP_NUM_THREADS": "1"}

    def launch(*args: object) -> str:
        command = [sys.executable, "train.py", *map(str, args)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return launch


@pytest.fixture(scope="module")
def trained(
    tiny: Path, launch: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Root of a run on two processes, with each rank's weights beside it."""
    root = tmp_path_factory.mktemp("two")
    spy = ("--trainer.callbacks+=spy.Spy", f"--trainer.callbacks.folder={root}")
    options = ("--trainer.default_root_dir", root, "--data.batch_size", "2")
    launch("fit", "--config", tiny, *options, *DDP, *spy)
    return root


def test_weights_are_identical_on_both_ranks(trained: Path) -> None:
    ranks = [torch.load(trained / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["weights"].keys() == ranks[1]["weights"].keys()
    for key, value in ranks[0]["weights"].items():
        if "running_" not in key:  # batch norm keeps each rank's own statistics
            assert torch.equal(value, ranks[1]["weights"][key]), key


def test_ranks_share_the_training_set(trained: Path) -> None:
    names = [torch.load(trained / f"rank{rank}.pt", weights_only=True)["names"] for rank in (0, 1)]
    assert [len(shown) for shown in names] == [8, 8]
    for epoch in (slice(0, 4), slice(4, 8)):
        assert len({*names[0][epoch], *names[1][epoch]}) == 8


def test_only_one_run_folder_is_made(trained: Path) -> None:
    assert [path.name for path in (trained / "tiny").iterdir()] == ["version_0"]


def test_metric_equals_that_of_one_process(
    trained: Path,
    launch: Callable[..., str],
    tmp_path: Path,
    logged: Callable[[Path, str], list[float]],
) -> None:
    checkpoint = trained / "tiny/version_0/checkpoints/last.ckpt"
    for name, options in (("one", ()), ("two", DDP)):
        root = ("--trainer.default_root_dir", tmp_path / name)
        out = launch("validate", "--ckpt_path", checkpoint, *root, *options)
        assert out.count("val, in percent") == 1
    one, two = (tmp_path / name / "tiny/validate_0" for name in ("one", "two"))
    for key in ("val/mIoU", "val/aAcc", "val/IoU/ground", "val/loss"):
        assert logged(two, key) == pytest.approx(logged(one, key), abs=1e-6), key
    costs = [json.loads((place / "results.json").read_text())["cost"] for place in (one, two)]
    assert [cost["eval_images"] for cost in costs] == [5, 5]


def test_score_files_equal_those_of_one_process(
    trained: Path, launch: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint = trained / "tiny/version_0/checkpoints/last.ckpt"
    for name, options in (("one", ()), ("two", DDP)):
        root = ("--trainer.default_root_dir", tmp_path / name)
        extra = ("--model.extra_metrics", "[boundary_iou, calibration]")
        launch("test", "--ckpt_path", checkpoint, *root, *options, *extra)
    for file in ("images.csv", "intervals.csv", "confusion.csv", "calibration.csv"):
        one, two = (tmp_path / name / "tiny/test_0" / file for name in ("one", "two"))
        assert cells(two) == pytest.approx(cells(one), abs=2e-6), file


def cells(path: Path) -> list[str | float]:
    """Of a CSV file; fractions may differ by the last bits of a convolution."""
    texts = [cell for line in path.read_text().splitlines() for cell in line.split(",")]
    return [float(text) if text[1:2] == "." else text for text in texts]
