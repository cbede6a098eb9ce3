"""Runs that are stopped as users and machines stop them, and continued with `fit --resume`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from seglab.task import SegmentationTask

ROOT = Path(__file__).parents[2]
Run = Callable[..., None]
LONG = ("--trainer.max_epochs", "15", "--data.batch_size", "2", "--data.num_workers", "2")
LONG += ("--model.total_batch", "4", "--data.eval_batch_size", "1")
N_STEPS = 30


@pytest.fixture(scope="session")
def whole(run: Run, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nobody interrupts."""
    root = tmp_path_factory.mktemp("whole")
    run("fit", "--config", tiny, "--trainer.default_root_dir", root, *LONG)
    return root / "tiny/version_0"


def start(tiny: Path, root: Path, *more: str) -> subprocess.Popen:
    """A training in a process group of its own, as a terminal starts it."""
    command = [sys.executable, "train.py", "fit", "--config", str(tiny)]
    return subprocess.Popen(
        [*command, "--trainer.default_root_dir", str(root), *LONG, *more],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell's background job ignores Ctrl-C, and so would everything it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_until_it_trains(process: subprocess.Popen, folder: Path) -> None:
    while not (folder / "metrics.csv").exists() and process.poll() is None:
        time.sleep(0.01)


def assert_same_run(found: Path, expected: Path) -> None:
    """Weights, optimizer, figures of every step and results, bit for bit."""
    states = [
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        for folder in (found, expected)
    ]
    assert [state["global_step"] for state in states] == [N_STEPS] * 2
    for name, value in states[1]["state_dict"].items():
        assert torch.equal(states[0]["state_dict"][name], value), name
    momenta = [state["optimizer_states"][0]["state"] for state in states]
    for index, moments in momenta[1].items():
        assert all(torch.equal(momenta[0][index][key], moments[key]) for key in moments)
    for name in ("metrics.csv", "scale_equalization.csv", "results.md", "config.yaml"):
        theirs = (expected / name).read_text().replace(str(expected.parents[1]), "ROOT")
        assert (found / name).read_text().replace(str(found.parents[1]), "ROOT") == theirs, name


def stop_and_continue(run: Run, tiny: Path, root: Path, signum: int, delay: float) -> Path:
    process = start(tiny, root)
    folder = root / "tiny/version_0"
    wait_until_it_trains(process, folder)
    time.sleep(delay)
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=200)
    if process.returncode == 0:  # a quick machine was done before the signal came
        return folder
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in out + err
    said = err.rstrip().splitlines()[-1]
    assert said.startswith("train.py: stopped after step "), said
    assert said.endswith(f"continue with: python train.py fit --resume {folder}")
    run("fit", "--resume", folder)
    assert [path.name for path in (root / "tiny").iterdir()] == ["version_0"]
    return folder


def test_run_stopped_by_ctrl_c_continues_in_its_folder(
    run: Run, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    assert_same_run(stop_and_continue(run, tiny, tmp_path, signal.SIGINT, 0.2), whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))  # ten were run once; half a minute each
def test_any_interruption_continues_bit_for_bit(
    run: Run, tiny: Path, whole: Path, tmp_path: Path, number: int
) -> None:
    signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
    delay = random.Random(number).uniform(0, 1.2)
    assert_same_run(stop_and_continue(run, tiny, tmp_path, signum, delay), whole)


@pytest.mark.slow
def test_ten_interruptions_in_a_row_change_no_bit(
    run: Run,
    tiny: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Signals arrive in the middle of drawn batches, of training and validation, time and again."""
    draw, left = random.Random(0), [0]
    signums = [signal.SIGINT, signal.SIGTERM] * 5

    def interrupting(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signums[0])
            return step(*args, **options)

        return wrapped

    for name in ("training_step", "validation_step"):
        monkeypatch.setattr(SegmentationTask, name, interrupting(getattr(SegmentationTask, name)))
    folder, n_stops = tmp_path / "tiny/version_0", 0
    command = ["fit", "--config", tiny, "--trainer.default_root_dir", tmp_path, *LONG]
    while signums:
        left[0] = draw.randint(1, 9)
        with pytest.raises(SystemExit) as stop:
            run(*command)
        assert stop.value.code == 128 + signums.pop(0)
        assert "stopped after step " in capsys.readouterr().err
        n_stops += 1
        command = ["fit", "--resume", folder]
    run(*command)
    assert n_stops == 10
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["version_0"]
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "to_all"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_two_ranks_stop_at_one_step_and_continue(
    tiny: Path, tmp_path: Path, signum: int, to_all: bool
) -> None:
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    two += ("--data.num_workers", "0")
    process = start(tiny, tmp_path / "whole", *two)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    folder = tmp_path / "stopped/tiny/version_0"
    process = start(tiny, tmp_path / "stopped", *two)
    wait_until_it_trains(process, folder)
    time.sleep(0.5)
    (os.killpg if to_all else os.kill)(process.pid, signum)
    out, err = process.communicate(timeout=200)
    if process.returncode == 0:
        return
    assert process.returncode == 128 + signum, err
    assert err.count("stopped after step") == 1
    assert "Traceback" not in out + err
    command = [sys.executable, "train.py", "fit", "--resume", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, tmp_path / "whole/tiny/version_0")


@pytest.mark.slow
def test_crash_continues_from_the_last_checkpoint(
    run: Run, tiny: Path, whole: Path, tmp_path: Path
) -> None:
    process = start(tiny, tmp_path)
    folder = tmp_path / "tiny/version_0"
    while not (folder / "checkpoints/last.ckpt").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    run("fit", "--resume", folder)
    assert_same_run(folder, whole)
