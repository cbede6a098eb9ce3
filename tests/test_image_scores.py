"""Figures, scores per image and intervals against loops in numpy; files of `test` read back."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seglab.image_scores import bootstrap, count_images, figures
from seglab.metrics import count_pairs, summarize
from seglab.reporting.score_files import draw_confusion


def draw(shape: tuple[int, ...], n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    label = random.integers(0, n_classes, shape)
    found = np.where(random.random(shape) < 0.6, label, random.integers(0, n_classes, shape))
    label[random.random(shape) < 0.1] = 255
    return found, label


def by_loop(found: np.ndarray, label: np.ndarray, n_classes: int) -> dict[str, float]:
    """Definitions written out, one class after another."""
    kept = label != 255
    found, label = found[kept], label[kept]
    precision, weighted = [], 0.0
    for k in range(n_classes):
        both = ((found == k) & (label == k)).sum()
        either = ((found == k) | (label == k)).sum()
        if (found == k).any():
            precision.append(both / (found == k).sum())
        if (label == k).any():
            weighted += (label == k).mean() * both / either
    return {"mPrecision": float(np.mean(precision)), "fwIoU": float(weighted)}


@pytest.mark.parametrize("n_classes", [1, 2, 7])
def test_precision_and_weighted_iou_equal_definitions(n_classes: int) -> None:
    found, label = draw((3, 20, 20), n_classes)
    # Two classes more that are neither labelled nor predicted, one that is only predicted.
    found[0, 0, :2] = n_classes + 2
    label[0, 0, :2] = 0
    pairs = count_pairs(torch.from_numpy(found), torch.from_numpy(label), n_classes + 3)
    results = summarize(pairs)
    expected = by_loop(found, label, n_classes + 3)
    for key, value in expected.items():
        assert results[key] == pytest.approx(value, abs=1e-12)
    assert results["Precision"][n_classes : n_classes + 2].isnan().all()
    assert results["Precision"][-1] == 0


def test_nothing_labelled_has_no_figures() -> None:
    results = summarize(torch.zeros(3, 3, dtype=torch.long))
    assert np.isnan([results[key] for key in ("mPrecision", "fwIoU", "mIoU", "aAcc")]).all()


def test_counts_are_of_each_image_alone() -> None:
    found, label = draw((5, 9, 11), 4)
    label[3] = 255  # an image without labels
    counts = count_images(torch.from_numpy(found), torch.from_numpy(label), 4)
    for index in range(5):
        for k in range(4):
            kept = label[index] != 255
            expected = [
                ((found[index] == k) & (label[index] == k)).sum(),
                (label[index] == k).sum(),
                ((found[index] == k) & kept).sum(),
            ]
            assert counts[index, :, k].tolist() == expected
    whole = count_pairs(torch.from_numpy(found), torch.from_numpy(label), 4)
    assert torch.equal(counts.sum(0)[0], whole.diagonal())
    assert np.isnan(figures(counts)["mIoU"][3])


def test_interval_is_that_of_drawn_images() -> None:
    random = np.random.default_rng(3)
    counts = torch.from_numpy(random.integers(1, 50, (12, 1, 3)).repeat(3, 1))
    counts[:, 1:] += torch.from_numpy(random.integers(0, 40, (12, 2, 3)))
    found = bootstrap(counts, n_draws=4000)
    mious = []
    for _ in range(4000):
        drawn = counts.numpy()[random.integers(0, 12, 12)].sum(0)
        mious.append(np.mean(drawn[0] / (drawn[1] + drawn[2] - drawn[0])))
    expected = np.percentile(mious, [2.5, 97.5])
    spread = expected[1] - expected[0]
    np.testing.assert_allclose(found["mIoU"], expected, atol=0.06 * spread)
    assert found["IoU"].shape == (2, 3)


def test_interval_covers_what_it_promises() -> None:
    """Accuracy of images drawn from a known kind: about 95 of 100 intervals hold it."""
    random = np.random.default_rng(0)
    n_held = 0
    for _ in range(200):
        n_right = random.binomial(100, random.beta(8, 2, 60))
        counts = np.zeros((60, 3, 2), np.int64)
        counts[:, 0, 0], counts[:, 1, 0], counts[:, 2, 0] = n_right, 100, n_right
        counts[:, 2, 1] = 100 - n_right
        low, high = bootstrap(torch.from_numpy(counts), n_draws=200)["aAcc"]
        n_held += low <= 0.8 <= high
    assert 0.88 <= n_held / 200 <= 0.99


def test_class_of_one_image_has_an_interval_and_an_absent_none() -> None:
    counts = torch.zeros(4, 3, 3, dtype=torch.long)
    counts[:, :, 0] = 10
    counts[0, :, 1] = 5
    ends = bootstrap(counts, n_draws=50)
    assert ends["IoU"][:, 1].tolist() == [1, 1]
    assert np.isnan(ends["IoU"][:, 2]).all()


@pytest.mark.parametrize(("n_images", "confidence"), [(1, 0.95), (0, 0.95), (5, 1.0)])
def test_interval_without_meaning_is_refused(n_images: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="needs two"):
        bootstrap(torch.ones(n_images, 3, 2), confidence)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_test_leaves_scores_and_matrix(
    fitted: Path, run: Callable[..., None], tmp_path: Path, logged: Callable[..., list[float]]
) -> None:
    import seglab
    from seglab.data import ScenesDataModule

    checkpoint = fitted / "checkpoints/last.ckpt"
    args = ("--trainer.accelerator", "cpu", "--trainer.default_root_dir", tmp_path)
    run("test", "--ckpt_path", checkpoint, *args)
    (folder,) = {path.parent for path in tmp_path.rglob("images.csv")}
    rows = read(folder / "images.csv")
    data = ScenesDataModule(size=32, train_length=8, val_length=5, num_workers=0)
    data.setup("test")
    assert [row["name"] for row in rows] == sorted(data.test_dataset[i]["name"] for i in range(5))
    model = seglab.load(checkpoint, device="cpu")
    pairs = np.zeros((8, 8), int)
    for index in range(5):
        sample = data.test_dataset[index]
        ids, label = model.predict(sample["image"]), np.asarray(sample["mask"])
        kept = label != 255
        np.add.at(pairs, (label[kept].astype(int), ids[kept].astype(int)), 1)
        row = next(row for row in rows if row["name"] == sample["name"])
        assert float(row["aAcc"]) == pytest.approx((ids == label)[kept].mean(), abs=1e-5)
    table = [list(row.values()) for row in read(folder / "confusion.csv")]
    assert [[int(cell) for cell in row[1:]] for row in table] == pairs.tolist()
    intervals = {(row["figure"], row["class"]): row for row in read(folder / "intervals.csv")}
    miou = intervals["mIoU", ""]
    assert float(miou["value"]) == pytest.approx(logged(folder, "test/mIoU")[-1], abs=1e-5)
    assert float(miou["low"]) <= float(miou["value"]) <= float(miou["high"])
    assert len(intervals) == 7 + 5 * 8  # loss and shares too
    with Image.open(folder / "confusion.png") as picture:
        assert picture.mode == "RGB"


def test_matrix_is_drawn_dark_where_it_counts() -> None:
    confusion = np.array([[10, 0, 0], [5, 5, 0], [0, 0, 0]])
    picture = draw_confusion(confusion, ["a", "b", "c"])
    side = 48
    margin = picture.shape[0] - 3 * side
    corner = picture[margin + 1 :: side, margin + 1 :: side][:3, :3]
    assert corner[0, 0].tolist() == [8, 48, 107]
    assert corner[0, 1].tolist() == [255, 255, 255]
    assert corner[1, 0].tolist() == corner[1, 1].tolist() == [132, 152, 181]
    assert (corner[2] == 200).all()


def test_matrix_of_many_classes_stays_a_picture() -> None:
    assert draw_confusion(np.eye(1500, dtype=int), ["x"] * 1500).shape == (1500, 1500, 3)
