"""Two processes get the weights and moments of one that was fed the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def launch(world: int, script: str, *arguments: str) -> None:
    """Start a script in so many processes."""
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(FOLDER / script), *arguments],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


def run(case: str, world: int, folder: Path) -> list[dict]:
    folder.mkdir()
    launch(world, "run_ranks.py", case, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "uneven", "lightning"])
def test_two_ranks_equal_one_process(case: str, tmp_path: Path):
    (one,) = run(case, 1, tmp_path / "one")
    first, second = run(case, 2, tmp_path / "two")
    assert first["digest"] == second["digest"]
    assert first["rows"] == second["rows"]
    for a, b in zip(first["rows"], one["rows"], strict=True):
        assert a["count"] == b["count"]
        assert a["std"] == pytest.approx(b["std"], rel=1e-12)
        assert a["mean"] == pytest.approx(b["mean"], rel=1e-12)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> tuple[dict, dict, dict]:
    """Every case of run_ranks_training.py: in one process, on rank 0, on rank 1."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    launch(1, "run_ranks_training.py", str(one))
    launch(2, "run_ranks_training.py", str(two))
    return tuple(torch.load(f) for f in (one / "0.pt", two / "0.pt", two / "1.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fold", "reparametrize", "groups"])
def test_two_ranks_train_as_one_process(trainings, mode):
    cases = [case for case in trainings[0] if case[0] == mode]
    assert len(cases) == 6
    for case in cases:
        one, first, second = (results[case] for results in trainings)
        for name, expected in one.items():
            assert torch.equal(first[name], second[name]), (case, name)
            assert torch.allclose(first[name], expected, rtol=0, atol=1e-12), (case, name)
