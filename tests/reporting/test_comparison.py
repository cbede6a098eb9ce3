"""Comparisons against loops in numpy: by image, by seed; and what is refused to be paired."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from web_pages import parse

from seglab.reporting.pages.compared_view import view_comparison
from seglab.reporting.pages.comparison import (
    config_differences,
    group_by_config,
    pair_by_image,
    pair_by_seed,
)
from seglab.reporting.pages.page import write_report
from seglab.reporting.pages.run_files import Run, read_run

NAMES = ("road", "tree", "sky")


def draw_counts(seed: int, better: int = 0, n_images: int = 30) -> np.ndarray:
    """Hits, labelled and predicted pixels (N, 3, K); the labels do not depend on `better`."""
    random = np.random.default_rng(seed)
    labelled = random.integers(50, 400, (n_images, 3))
    found = (labelled * random.uniform(0.3, 0.8, labelled.shape)).astype(int)
    hits = np.minimum(labelled, found + better)
    predicted = hits + random.integers(0, 60, labelled.shape)
    return np.stack([hits, labelled, predicted], 1)


def iou(counts: np.ndarray) -> np.ndarray:
    hits, labelled, predicted = counts
    return hits / (labelled + predicted - hits)


def make_run(
    folder: Path, counts: np.ndarray, names: list[str] | None = None, seed: int = 0, lr: float = 0.1
) -> Run:
    folder.mkdir(parents=True)
    each = iou(counts.sum(0))
    classes = [{"name": n, "IoU": v, "Acc": v, "Dice": v, "share_of_labels": 0.3}
               for n, v in zip(NAMES, each.tolist(), strict=True)]  # fmt: skip
    results = {"split": "val", "step": 5, "mIoU": each.mean(), "classes": classes}
    (folder / "results.json").write_text(json.dumps(results))
    config = {"seed_everything": seed, "trainer": {"default_root_dir": str(folder)}, "lr": lr}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    names = names or [f"image_{index:03d}" for index in range(len(counts))]
    np.savez(folder / "counts.npz", names=names, counts=counts, class_names=NAMES)
    return read_run(folder)


def page_text(folder: Path) -> str:
    return (folder / "page.html").read_text(encoding="utf-8")


def pair(one: Run, two: Run) -> Any:
    return pair_by_image(one.evaluations[0], two.evaluations[0])


def test_difference_by_image_equals_a_loop(tmp_path: Path) -> None:
    one, two = draw_counts(0), draw_counts(0, better=20)
    found = pair(make_run(tmp_path / "a", one), make_run(tmp_path / "b", two))
    random = np.random.default_rng(9)
    draws = []
    for _ in range(3000):
        chosen = random.integers(0, 30, 30)
        draws.append(iou(two[chosen].sum(0)) - iou(one[chosen].sum(0)))
    expected = np.percentile(np.mean(draws, 1), [2.5, 97.5])
    miou = found["mIoU", ""]
    assert miou.value == pytest.approx((iou(two.sum(0)) - iou(one.sum(0))).mean())
    np.testing.assert_allclose(miou[1:], expected, atol=0.1 * (expected[1] - expected[0]))
    tree = np.percentile(np.array(draws)[:, 1], [2.5, 97.5])
    np.testing.assert_allclose(found["IoU", "tree"][1:], tree, atol=0.1 * (tree[1] - tree[0]))


def test_pairing_is_narrower_than_two_intervals(tmp_path: Path) -> None:
    from seglab.image_scores import bootstrap

    one, two = draw_counts(0), draw_counts(0, better=20)
    paired = pair(make_run(tmp_path / "a", one), make_run(tmp_path / "b", two))["mIoU", ""]
    import torch

    spans = [np.ptp(bootstrap(torch.from_numpy(counts))["mIoU"]) for counts in (one, two)]
    assert paired.high - paired.low < 0.7 * np.hypot(*spans)


def test_order_of_images_does_not_matter(tmp_path: Path) -> None:
    one, two = draw_counts(0), draw_counts(0, better=20)
    order = np.random.default_rng(1).permutation(30)
    first = make_run(tmp_path / "a", one)
    same = make_run(tmp_path / "b", two)
    moved = make_run(tmp_path / "c", two[order], [f"image_{index:03d}" for index in order])
    assert pair(first, same) == pair(first, moved)
    assert pair(first, first)["mIoU", ""] == (0, 0, 0)


def test_what_is_not_the_same_is_not_paired(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", draw_counts(0))
    others = make_run(tmp_path / "b", draw_counts(0), [f"other_{i}" for i in range(30)])
    labels = make_run(tmp_path / "c", draw_counts(1))
    bare = make_run(tmp_path / "d", draw_counts(0))
    (tmp_path / "d" / "counts.npz").unlink()
    assert pair(first, others) == "the images differ"
    assert pair(first, labels) == "the labels of the images differ"
    renamed = make_run(tmp_path / "e", draw_counts(0)[..., ::-1])  # as many pixels, other classes
    assert pair(first, renamed) == "the labels of the images differ"
    assert "counts.npz is missing" in pair(first, bare)


def test_seeds_are_paired_across_configs(tmp_path: Path) -> None:
    from scipy.stats import ttest_rel

    runs = [
        make_run(tmp_path / f"{lr}_{seed}", draw_counts(seed, int(100 * lr)), seed=seed, lr=lr)
        for lr in (0.1, 0.2)
        for seed in (1, 2, 3)
    ]
    groups = group_by_config(runs)
    assert [len(group) for group in groups] == [3, 3]
    (found,) = pair_by_seed(groups, "val", "mIoU")
    scores = [[run.results["mIoU"] for run in group] for group in groups]
    expected = ttest_rel(scores[1], scores[0]).confidence_interval(0.95)
    assert found.seeds == (1, 2, 3)
    assert found.difference == pytest.approx((np.subtract(*scores[::-1]).mean(), *expected))
    assert config_differences(runs[:1] + runs[3:4]) == [("lr", [0.1, 0.2])]


def test_seed_that_found_nothing_counts_in_the_mean(tmp_path: Path) -> None:
    nothing = draw_counts(0) * np.array([0, 1, 1])[:, None]
    counts = (nothing, draw_counts(0), draw_counts(0, better=20))
    runs = [make_run(tmp_path / str(seed), each, seed=seed) for seed, each in enumerate(counts)]
    (group,) = view_comparison(runs, list("abc"))["groups"]
    mean = 100 * np.mean([0, *(iou(each.sum(0)).mean() for each in counts[1:])])
    assert group["mean"] == f"{mean:.2f}"


def test_seed_alone_makes_no_other_config(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), draw_counts(0), seed=seed) for seed in (1, 2)]
    assert len(group_by_config(runs)) == 1
    assert config_differences(runs) == [("seed_everything", [1, 2])]


def test_page_of_several_runs_shows_the_difference(tmp_path: Path) -> None:
    folders = [tmp_path / "logs" / "x" / f"version_{number}" for number in range(3)]
    make_run(folders[0], draw_counts(0))
    better = make_run(folders[1], draw_counts(0, better=20), lr=0.2)
    make_run(folders[2], draw_counts(1), seed=1)
    write_report(folders, tmp_path / "page.html")
    text = page_text(tmp_path)
    page = parse((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.faults == []
    assert page.external == []
    gain = 100 * (better.results["mIoU"] - read_run(folders[0]).results["mIoU"])
    (row,) = [cells for cells in page.rows if cells[0] == "x/version_1" and len(cells) == 10]
    assert row[5] == f"+{gain:.2f}"
    assert f'<span class="clear">{row[5]}</span>' in page_text(tmp_path)
    write_report([folders[1], folders[0]], tmp_path / "page.html")  # the other way round
    assert f'<span class="clear worse">\N{MINUS SIGN}{gain:.2f}</span>' in page_text(tmp_path)
    shutil.copytree(folders[0], tmp_path / "same")
    write_report([folders[0], tmp_path / "same"], tmp_path / "page.html")
    assert 'class="clear"' not in page_text(tmp_path)
    assert "x/version_2 is not paired with the first run by image: the labels" in text
    assert page.count("details") >= 3
