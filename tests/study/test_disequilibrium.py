"""Summaries of what was measured at fusions, against figures by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from synthetic_studies import write_mechanism

from seglab.study.disequilibrium import Mechanism, read_traces, settled_step, summarize


def write(path: Path, rows: str) -> Path:
    path.write_text("step,fusion,branch,std,share,gradient,update\n" + rows)
    return path


def only(path: Path) -> Mechanism:
    (found,) = summarize([*read_traces(path, "off", 0)])
    return found


def test_ratios_are_of_first_and_last_measurement(tmp_path: Path) -> None:
    rows = "0,f,0,4,0.7,2,\n0,f,1,1,0.1,1,\n0,f,2,2,0.2,8,\n"
    rows += "50,f,0,3,0.5,3,0.1\n50,f,1,2,0.3,2,0.4\n50,f,2,2,0.2,2,0.2\n"
    found = only(write(tmp_path / "a.csv", rows))
    assert (found.first_step, found.last_step, found.n_runs) == (0, 50, 1)
    assert found.std_ratio == (4, 1.5)
    assert found.share_spread == pytest.approx((0.6, 0.3))
    assert found.gradient_ratio == (8, 1.5)
    assert found.update_ratio == (4, 4)  # measured from step 50 on
    assert found.settled_step == 50


def test_seeds_are_summarized_by_medians(tmp_path: Path) -> None:
    traces = []
    for seed, std in enumerate((2, 3, 10)):
        path = write(tmp_path / f"{seed}.csv", f"0,f,0,{std},,,\n0,f,1,1,,,\n0,g,0,1,,,\n")
        traces += read_traces(path, "off", seed)
    of_f, of_g = summarize(traces)
    assert (of_f.fusion, of_f.n_runs, of_f.std_ratio) == ("f", 3, (3, 3))
    assert of_g.std_ratio == (1, 1)
    assert math.isnan(of_f.gradient_ratio[0])


def test_branch_without_variance_is_infinitely_apart(tmp_path: Path) -> None:
    found = only(write(tmp_path / "a.csv", "0,f,0,1,,,\n0,f,1,0,,,\n"))
    assert found.std_ratio == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4, 2.1, 2.05, 2], 10),
        ([2, 4, 2.05, 2], 20),  # near at first does not count
        ([2, 2, 2, 2], 0),
        ([4, 2.3, np.nan, 2], 30),
        ([1, 1.5, 2.5, 4], 30),
    ],
)
def test_settled_is_where_the_last_departure_ends(values: list[float], expected: int) -> None:
    assert settled_step(np.array([0, 10, 20, 30]), np.array(values)) == expected


def test_equalized_arm_has_no_disequilibrium(tmp_path: Path) -> None:
    for arm, ratio in (("off", 4), ("fold", 1)):
        write_mechanism(tmp_path / "a.csv", arm, 0)
        assert only(tmp_path / "a.csv").std_ratio[0] == pytest.approx(ratio)
