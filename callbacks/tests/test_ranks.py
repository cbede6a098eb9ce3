"""Two processes get the weights and moments of one that was fed the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_ranks.py")


def run(case: str, world: int, folder: Path) -> list[dict]:
    folder.mkdir()
    launch = [sys.executable]
    if world > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, str(SCRIPT), case, str(folder)],
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
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
