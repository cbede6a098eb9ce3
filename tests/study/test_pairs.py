"""Which runs are a pair, their figures, and what is said about the others."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from seglab.study.pairs import area, pair_runs
from seglab.study.records import Record

EQUAL = {"initial weights": "a", "training data": "b"}


def record(arm: str, seed: int, final: float = 0.5, **changes: object) -> Record:
    curve = ((10, 0.1), (20, 0.6), (30, final))
    return replace(Record(arm, seed, "finished", pairing=EQUAL, curve=curve), **changes)


def runs(*records: Record) -> dict[tuple[str, int], Record]:
    return {(r.arm, r.seed): r for r in records}


def test_differences_are_by_seed_in_points() -> None:
    found = runs(
        record("on", 0, 0.52), record("off", 0, 0.5), record("off", 1, 0.7), record("on", 1, 0.4)
    )
    assert pair_runs(found, "on", "off", [0, 1]).differences == pytest.approx((2, -30))
    assert pair_runs(found, "on", "off", [0, 1], "best").differences == pytest.approx((0, -10))
    # Trapezoids by hand: half of the last step's difference, over two steps of equal width.
    by_hand = 100 * np.array([0.02, -0.3]) / 2 / 2
    assert pair_runs(found, "on", "off", [0, 1], "area").differences == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (None, "off has not ended yet"),
        (record("off", 0, status="failed", error="out of memory"), "off failed: out of memory"),
        (record("off", 0, pairing={**EQUAL, "training data": "c"}), "no pair: training data of"),
        (record("off", 0, pairing={"initial weights": "a"}), "no pair: training data of"),
        (record("off", 0, curve=()), "off has no validation"),
        (record("off", 0, math.nan), "mIoU of off is not a number"),
    ],
)
def test_run_without_a_partner_is_left_out(other: Record | None, reason: str) -> None:
    found = runs(
        record("on", 0), record("on", 1), record("off", 1, 0.4), *([other] if other else [])
    )
    pairs = pair_runs(found, "on", "off", [0, 1])
    assert pairs.seeds == (1,)
    assert pairs.differences == pytest.approx((10,))
    assert reason in pairs.left_out[0]
    turned = pair_runs(found, "off", "on", [0, 1])
    assert turned.seeds == (1,)
    assert reason.replace("of off", "of").split(" of")[0] in turned.left_out[0]


def test_digests_that_nobody_recorded_prove_nothing() -> None:
    found = runs(record("on", 0, pairing={}), record("off", 0, pairing={}))
    assert "no digests" in pair_runs(found, "on", "off", [0]).left_out[0]


def test_only_what_the_plan_compares_must_be_equal() -> None:
    found = runs(record("on", 0, pairing={**EQUAL, "initial weights": "x"}), record("off", 0))
    assert pair_runs(found, "on", "off", [0], compared=["training data"]).seeds == (0,)
    assert pair_runs(found, "on", "off", [0], compared=[]).seeds == (0,)
    assert pair_runs(found, "on", "off", [0], compared=["frozen weights"]).seeds == ()


def test_curves_of_other_steps_have_no_common_area() -> None:
    found = runs(record("on", 0), record("off", 0, curve=((10, 0.1), (30, 0.5))))
    assert "different steps" in pair_runs(found, "on", "off", [0], "area").left_out[0]
    assert pair_runs(found, "on", "off", [0], "final").seeds == (0,)


def test_area_is_the_mean_over_uneven_steps() -> None:
    curve = [(0, 0.2), (10, 0.4), (100, 0.6)]
    dense = np.interp(np.linspace(0, 100, 100001), *zip(*curve, strict=True))
    assert area(curve) == pytest.approx(dense.mean(), abs=1e-5)
    assert math.isnan(area([(5, 0.3)]))
    assert math.isnan(area([]))
