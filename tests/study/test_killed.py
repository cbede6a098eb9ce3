"""A study that is killed again and again, and what it has at the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seglab.study.records import read_record

N_KILLS = 5
WITHOUT = ("--without", "[scale_equalization]")  # it takes most of the time of such short runs


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "seglab", "study", *map(str, args)]
    tests = str(Path(__file__).parents[1])  # where study_differences is
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def kill_some_time_later(process: subprocess.Popen[str], folder: Path, seconds: float) -> str:
    """Let the process begin a run, wait, and kill it; returns where the run was."""
    ended = set(folder.glob("runs/*/*/run.json"))
    deadline = time.monotonic() + 240
    while not (begun(folder) - {path.parent for path in ended}) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    for _ in range(500):  # the worker hears of it by itself
        if not workers_on(folder):
            break
        time.sleep(0.02)
    assert not workers_on(folder)
    unfinished = begun(folder) - {path.parent for path in folder.glob("runs/*/*/run.json")}
    return "inside a run" if unfinished else "between runs"


def ends_well(process: subprocess.Popen[str]) -> bool:
    process.communicate()
    return process.returncode == 0


def begun(folder: Path) -> set[Path]:
    return {path.parent for path in folder.glob("runs/*/*/log.txt")}


def workers_on(folder: Path) -> list[str]:
    """Processes that have a file of the study open."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                files = [os.readlink(path) for path in (process / "fd").iterdir()]
            except OSError:  # not ours, or gone
                continue
            found += [name for name in files if name.startswith(str(folder))]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks processes up in /proc")
def test_killed_five_times_ends_as_one_that_was_not(tiny: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arms = tmp_path / "arms.yaml"
    arms.write_text(json.dumps({"a": {}, "b": {"model": {"optimizer": {"lr": 0.01}}}}))
    args = ("--config", tiny, "--arms", arms, "--seeds", 3, *WITHOUT)
    assert ends_well(start(*args, "--output", whole))
    places, times, draws = [], {}, random.Random(0)
    process = start(*args, "--output", killed)
    for _ in range(N_KILLS):
        places.append(kill_some_time_later(process, killed, draws.uniform(0.0, 3.0)))
        now = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*/*/run.json")}
        assert {path: now[path] for path in times} == times  # none was done again
        times = now
        process = start("--resume", killed)
    assert ends_well(process)
    assert "inside a run" in places
    assert (killed / "plan.yaml").is_file()
    for path in whole.glob("runs/*/*"):
        twin = killed / path.relative_to(whole)
        ours, theirs = read_record(path), read_record(twin)
        assert (ours.arm, ours.seed, ours.status) == (theirs.arm, theirs.seed, theirs.status)
        assert (ours.curve, ours.per_class) == (theirs.curve, theirs.per_class)
        assert ours.pairing == theirs.pairing
        for name in ("metrics.csv", "counts.npz"):
            assert (path / name).read_bytes() == (twin / name).read_bytes(), name
    assert len(list(killed.glob("runs/*/*/run.json"))) == 6
    leftovers = [path for path in killed.rglob(".*") if path.is_file()]
    assert leftovers == []


@pytest.mark.slow
def test_worker_that_dies_fails_its_run_alone(tiny: Path, tmp_path: Path) -> None:
    arms = tmp_path / "arms.yaml"
    killer = {"class_path": "study_differences.KillsItsProcess"}
    arms.write_text(json.dumps({"dies": {"trainer": {"callbacks+": [killer]}}, "lives": {}}))
    args = ("--arms", arms, "--seeds", 1, *WITHOUT)
    process = start("--config", tiny, *args, "--output", tmp_path / "study")
    out, _ = process.communicate()
    assert process.returncode == 1
    assert "dies seed 0: failed: the process ended with code -9 in the middle of the run: it" in out
    assert read_record(tmp_path / "study" / "runs" / "lives" / "seed_0").status == "finished"


@pytest.mark.slow
def test_worker_told_to_stop_stops_the_study(tiny: Path, tmp_path: Path) -> None:
    arms, folder = tmp_path / "arms.yaml", tmp_path / "study"
    stopper = {"class_path": "study_differences.IsToldToStop"}
    arms.write_text(json.dumps({"stops": {"trainer": {"callbacks+": [stopper]}}}))
    args = ("--arms", arms, "--seeds", 2, *WITHOUT)
    process = start("--config", tiny, *args, "--output", folder)
    process.communicate()
    assert process.returncode == 1
    assert len(begun(folder)) == 1
    assert not list(folder.glob("runs/*/*/run.json"))
