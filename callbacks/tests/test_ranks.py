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


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> tuple[dict, dict]:
    """Every case of run_ranks_plans.py, on rank 0 and on rank 1."""
    folder = tmp_path_factory.mktemp("plans")
    launch(2, "run_ranks_plans.py", str(folder))
    return tuple(torch.load(folder / f"{rank}.pt") for rank in (0, 1))


def stds(case: dict) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in case["report"]["rows"]:
        found.setdefault(row["fusion"], []).append(row["std"])
    return found


@pytest.mark.slow
def test_ranks_change_the_same_weights_or_none(plans):
    first, second = plans
    for name, case in first.items():
        for key, values in case["state"].items():
            assert torch.equal(values, second[name]["state"][key]), (name, key)
        assert case["report"] == second[name]["report"], name


@pytest.mark.slow
def test_what_one_rank_alone_has_found_is_refused(plans):
    case = plans[0]["ways"]
    assert set(stds(case)) == {"always"}
    reasons = {refusal["name"]: refusal["reason"] for refusal in case["report"]["refusals"]}
    assert "the ranks found it differently" in reasons["small"]


@pytest.mark.slow
def test_rank_without_batches_takes_the_others_measurement(plans):
    generator = torch.Generator().manual_seed(1)  # as run_ranks_plans.images
    values = torch.stack([torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)])
    first, second = stds(plans[1]["empty"])["always"]
    assert first == pytest.approx(values.double().std(correction=0).item(), rel=1e-6)
    assert second == pytest.approx(4 * first, rel=1e-6)
    assert all("no batch to calibrate on" in rank["all_empty"]["error"] for rank in plans)


@pytest.mark.slow
def test_uneven_ranks_are_pooled_by_count(plans):
    parts = []
    for seed, n in ((1, 7), (2, 3)):
        generator = torch.Generator().manual_seed(seed)
        parts += [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(n)]
    case = plans[0]["uneven"]
    expected = torch.stack(parts).double()
    row = case["report"]["rows"][0]
    assert row["count"] == expected.numel()
    assert row["std"] == pytest.approx(expected.std(correction=0).item(), rel=1e-7)
    assert case["report"]["batches"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["broken", "raising"])
def test_error_on_one_rank_is_an_error_on_all(plans, name):
    torch.manual_seed(0)
    initial = torch.nn.Conv2d(6, 3, 3, padding=1).weight
    for rank in plans:
        assert rank[name]["error"]
        assert torch.equal(rank[name]["state"]["always.weight"], initial)
    if name == "raising":
        assert "rank 1 failed" in plans[0][name]["error"]
        assert "not the concatenation it was found with" in plans[1][name]["error"]
