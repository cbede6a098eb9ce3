"""Bootstraps over images against a loop in numpy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from synthetic_studies import iou, rewrite, write_study

from seglab.study.image_draws import ImageDraws, read_counts
from seglab.study.pairs import Pairs, pair_runs
from seglab.study.reading import read_study
from seglab.study.records import run_folder

ARMS = {"off": 0.0, "fold": 0.02}


def draws_of(folder: Path, n_draws: int = 2000) -> tuple[ImageDraws, Pairs]:
    study = read_study(folder)
    return ImageDraws(folder, study.runs, n_draws), pair_runs(
        study.runs, "fold", "off", study.seeds
    )


def counts_of(folder: Path, arm: str, n_seeds: int) -> list[np.ndarray]:
    return [np.load(run_folder(folder, arm, s) / "counts.npz")["counts"] for s in range(n_seeds)]


def test_intervals_are_those_of_a_loop(tmp_path: Path) -> None:
    write_study(tmp_path, ARMS, 4, n_images=8)
    random = np.random.default_rng(1)
    for arm, seed in itertools.product(ARMS, range(4)):  # images that differ in what they add
        folder = run_folder(tmp_path, arm, seed)
        names, counts = read_counts(folder / "counts.npz")
        counts[:, 0] = counts[:, 0] * random.uniform(0.6, 1, counts[:, 0].shape)
        np.savez(folder / "counts.npz", names=names, counts=counts)
        rewrite(folder, curve=[[1, 0.1], [2, float(np.nanmean(iou(counts)))]])
    draws, pairs = draws_of(tmp_path)
    found = draws.intervals(pairs)
    fold, off = (counts_of(tmp_path, arm, 4) for arm in ("fold", "off"))
    images, both, cars = [], [], []
    for _ in range(3000):
        chosen = random.integers(0, 8, 8)
        each = [iou(a[chosen]) - iou(b[chosen]) for a, b in zip(fold, off, strict=True)]
        mious = np.nanmean(each, 1)
        images.append(100 * mious.mean())
        both.append(100 * mious[random.integers(0, 4, 4)].mean())
        cars.append(100 * np.mean(each, 0)[2])
    for ends, values in (
        (found.images, images),
        (found.seeds_and_images, both),
        (found.classes[2], cars),
    ):
        expected = np.quantile(values, [0.025, 0.975])
        np.testing.assert_allclose(ends, expected, atol=0.08 * np.ptp(expected))
    assert found.classes[3] is None  # nowhere
    assert found.left_out == {}


def test_more_seeds_make_the_images_no_other(tmp_path: Path) -> None:
    """The same images in every seed: eight copies of one pair know no more than the pair."""
    write_study(tmp_path, ARMS, 8, spread=0.0)
    draws, pairs = draws_of(tmp_path)
    alone = Pairs("fold", "off", "final", (0,), pairs.differences[:1], {})
    one, eight = draws.intervals(alone), draws.intervals(pairs)
    assert one.images == pytest.approx(eight.images)
    assert eight.seeds_and_images == pytest.approx(eight.images)
    assert one.seeds_and_images is None


def test_order_of_images_in_a_file_does_not_matter(tmp_path: Path) -> None:
    write_study(tmp_path, ARMS, 2)
    before = draws_of(tmp_path)[0].intervals(draws_of(tmp_path)[1])
    path = run_folder(tmp_path, "off", 1) / "counts.npz"
    with np.load(path) as file:
        names, counts = file["names"][::-1], file["counts"][::-1]
    np.savez(path, names=names, counts=counts)
    assert draws_of(tmp_path)[0].intervals(draws_of(tmp_path)[1]) == before


def test_counts_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    write_study(tmp_path, ARMS, 5)
    (run_folder(tmp_path, "fold", 0) / "counts.npz").unlink()
    rewrite(run_folder(tmp_path, "off", 1), curve=[[1, 0.1], [2, 0.4]])
    names, counts = read_counts(run_folder(tmp_path, "off", 2) / "counts.npz")
    other = [f"other {name}" for name in names]
    np.savez(run_folder(tmp_path, "off", 2) / "counts.npz", names=other, counts=counts)
    np.savez(run_folder(tmp_path, "off", 3) / "counts.npz", names=names[:1], counts=counts[:1])
    draws, pairs = draws_of(tmp_path, 100)
    found = draws.intervals(pairs)
    assert pairs.seeds == (0, 1, 2, 3, 4)
    assert found.left_out[0] == "fold has no counts.npz"
    assert "but 40.000 was logged" in found.left_out[1]
    assert "different images" in found.left_out[2]
    assert "needs two" in found.left_out[3]
    assert found.images is not None
    assert found.seeds_and_images is None
