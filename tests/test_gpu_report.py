"""`benchmarks/gpu.py` keeps what is done, repeats what is not, and writes both down."""

from __future__ import annotations

from pathlib import Path

import gpu
import pytest
from gpu import Job


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    count = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + 'x')"
    marks = tmp_path / "marks"
    marks.mkdir()
    pieces = {
        "good": [Job("a table", f'-c "{count}; print(chr(124), 1, chr(124))" {marks}/good', "")],
        "bad": [
            Job("fails", f'-c "{count}; sys.exit(3)" {marks}/bad', ""),
            Job("never ends", '-c "print(5, flush=True); import time; time.sleep(60)"', ""),
        ],
    }
    for name in pieces:
        (marks / name).touch()
    monkeypatch.setattr(gpu, "PIECES", pieces)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
    return marks


def test_done_jobs_are_kept_and_others_repeated(jobs: Path, tmp_path: Path) -> None:
    for _ in range(2):
        gpu.run_piece("good", tmp_path, small=False, minutes=1)
        gpu.run_piece("bad", tmp_path, small=False, minutes=0.05)
    assert (jobs / "good").read_text() == "x"
    assert (jobs / "bad").read_text() == "xx"


def test_report_says_how_each_job_ended(jobs: Path, tmp_path: Path) -> None:
    assert gpu.report(tmp_path).count("Not run yet.") == 3
    gpu.run_piece("good", tmp_path, small=False, minutes=1)
    gpu.run_piece("bad", tmp_path, small=False, minutes=0.05)
    report = gpu.report(tmp_path)
    assert "| 1 |" in report
    assert "failed (3)" in report
    assert "out of time" in report
    assert "torch " in report


def test_job_without_time_left_is_not_begun(jobs: Path, tmp_path: Path) -> None:
    gpu.run_piece("good", tmp_path, small=False, minutes=0)
    assert (jobs / "good").read_text() == ""


def test_names_of_jobs_are_files_of_their_own() -> None:
    paths = [gpu.path_of(Path(), piece, job) for piece, jobs in gpu.PIECES.items() for job in jobs]
    assert len(set(paths)) == len(paths)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("piece", "job"),
    [
        pytest.param(piece, job, id=job.name)
        for piece, jobs in gpu.PIECES.items()
        for job in jobs
        if not job.name.startswith("training step") or "Swin" in job.name  # the others take minutes
    ],
)
def test_every_job_runs_at_its_smallest(
    piece: str, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = gpu.run(job, small=True, limit=400)
    assert result.code == 0, result.output[-3000:]
    assert piece == "tests" or "|" in result.output
