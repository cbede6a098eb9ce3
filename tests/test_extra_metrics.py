"""Boundary IoU and calibration against their authors' definitions, loops and torchmetrics."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from seglab.boundary import boundary_width, count_boundaries, is_boundary
from seglab.calibration import N_BINS, calibration_error, count_confidence, reliability
from seglab.extra_metrics import (
    EXTRA_METRICS,
    Predicted,
    SummedCounts,
    build_extra,
    count_extra,
    label,
    label_upsampled,
)
from seglab.image_scores import bootstrap, count_images
from seglab.metrics import SegmentationMetrics
from seglab.operators.logit_resize import LogitResize
from seglab.operators.resampling import Resampling

K = 4


def mask_to_boundary(mask: np.ndarray, dilation_ratio: float = 0.02) -> np.ndarray:
    """The authors' code, boundary-iou-api 6f4f5fc, boundary_iou/utils/boundary_utils.py."""
    h, w = mask.shape
    img_diag = np.sqrt(h**2 + w**2)
    dilation = round(dilation_ratio * img_diag)
    if dilation < 1:
        dilation = 1
    new_mask = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    kernel = np.ones((3, 3), dtype=np.uint8)
    new_mask_erode = cv2.erode(new_mask, kernel, iterations=dilation)
    mask_erode = new_mask_erode[1 : h + 1, 1 : w + 1]
    return mask - mask_erode


def by_distance(mask: np.ndarray, d: int) -> np.ndarray:
    """Pixels of a mask with something else, or the end, within d: asked pixel by pixel."""
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            whole = d <= y < height - d and d <= x < width - d
            square = mask[max(y - d, 0) : y + d + 1, max(x - d, 0) : x + d + 1]
            found[y, x] = mask[y, x] and not (whole and square.all())
    return found


def blobs(shape: tuple[int, int], seed: int, n_classes: int = K) -> np.ndarray:
    """Ids in large regions: the nearest of a few random points says which."""
    random = np.random.default_rng(seed)
    points = random.random((8, 2)) * shape
    grid = np.stack(np.indices(shape), -1)[..., None, :]
    nearest = ((grid - points) ** 2).sum(-1).argmin(-1)
    return random.integers(0, n_classes, 8)[nearest]


def authors_counts(ids: np.ndarray, target: np.ndarray, k: int) -> np.ndarray:
    """Common, labelled and predicted boundary pixels of each class of one image."""
    known = (target >= 0) & (target < k)
    rows = []
    for c in range(k):
        of_label = mask_to_boundary(((target == c) & known).astype(np.uint8)).astype(bool)
        of_ids = mask_to_boundary(((ids == c) & known).astype(np.uint8)).astype(bool)
        rows.append([(of_label & of_ids).sum(), of_label.sum(), of_ids.sum()])
    return np.array(rows).T


SHAPES = [(40, 60), (200, 150), (7, 90), (1, 1), (1, 30), (2, 2), (300, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_boundary_counts_equal_the_authors_code(shape: tuple[int, int]) -> None:
    ids = np.stack([blobs(shape, seed) for seed in (1, 2, 3)])
    target = np.stack([blobs(shape, seed) for seed in (1, 5, 6)])
    target[1][blobs(shape, 9, 2) == 0] = 255
    target[2] = 255  # nothing labelled
    found = count_boundaries(torch.from_numpy(ids), torch.from_numpy(target), K)
    expected = [authors_counts(a, b, K) for a, b in zip(ids, target, strict=True)]
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("d", [1, 2, 5, 40])
def test_boundary_is_what_lies_within_the_distance(d: int) -> None:
    ids = np.stack([blobs((23, 31), 1), blobs((23, 31), 2), np.zeros((23, 31), int)])
    found = is_boundary(torch.from_numpy(ids), d).numpy()
    for image, flags in zip(ids, found, strict=True):
        for c in range(K):
            mask = (image == c).astype(np.uint8)
            np.testing.assert_array_equal(flags & (image == c), by_distance(mask, d) > 0)


@pytest.mark.parametrize("shape", [(512, 512), (1024, 2048), (1, 1), (75, 100), (3, 4)])
def test_boundary_width_is_that_of_the_paper(shape: tuple[int, int]) -> None:
    assert boundary_width(*shape) == max(1, round(0.02 * np.sqrt(shape[0] ** 2 + shape[1] ** 2)))


def test_prediction_at_ignored_pixels_changes_no_boundary() -> None:
    target = torch.from_numpy(blobs((60, 80), 3))[None]
    target[:, 20:40] = 255
    ids = torch.from_numpy(blobs((60, 80), 4))[None]
    other = torch.where(target == 255, 3 - ids, ids)
    assert not torch.equal(ids, other)
    counts = [count_boundaries(x, target, K) for x in (ids, other)]
    assert torch.equal(*counts)


def softmax_maps(seed: int, n: int = 3, shape: tuple[int, int] = (20, 24)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, K, *shape, generator=generator)).softmax(1)


def targets(seed: int, n: int = 3, shape: tuple[int, int] = (20, 24)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, K, (n, *shape), generator=generator)
    found[torch.rand(found.shape, generator=generator) < 0.2] = 255
    return found


def loop_calibration(chances: np.ndarray, target: np.ndarray) -> float:
    """Guo et al. 2017, equations 1 to 3, pixel by pixel."""
    ids, confidence = chances.argmax(1), chances.max(1)
    error, n = 0.0, int((target != 255).sum())
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15) & (target != 255)
        if inside.any():
            accuracy = (ids == target)[inside].mean()
            error += inside.sum() / n * abs(accuracy - confidence[inside].mean())
    return error


def test_calibration_error_equals_loop_and_torchmetrics() -> None:
    from torchmetrics.classification import MulticlassCalibrationError

    theirs = MulticlassCalibrationError(K, n_bins=15, norm="l1", ignore_index=255)
    counts = []
    for seed in (1, 2):
        chances, target = softmax_maps(seed), targets(seed)
        confidence, ids = chances.max(1)
        counts.append(count_confidence(confidence, ids, target, K))
        theirs.update(chances, target)
    found = float(calibration_error(torch.cat(counts).sum(0)))
    both = torch.cat([softmax_maps(seed) for seed in (1, 2)]).double().numpy()
    every = torch.cat([targets(seed) for seed in (1, 2)]).numpy()
    assert found == pytest.approx(loop_calibration(both, every), abs=1e-6)
    assert found == pytest.approx(float(theirs.compute()), abs=1e-6)


def test_bins_are_closed_above_and_sums_exact() -> None:
    values = torch.tensor([1 / 15, 2 / 15, 1.0, 0.5, 1e-9, 0.0])
    counts = count_confidence(values.view(1, 1, 6), *torch.zeros(2, 1, 1, 6).long(), k=2)
    assert counts[0, 0].nonzero().flatten().tolist() == [0, 1, 7, 14]
    assert counts[0, 0, 0] == 3
    assert counts[0, 2].sum() / 2**24 == pytest.approx(float(values.sum()), abs=1e-6)
    _, accuracy, sure = reliability(counts[0])
    assert (accuracy[[0, 1, 7, 14]] == 1).all()
    assert sure[7] == 0.5


def test_confidence_that_is_no_number_is_not_hidden() -> None:
    confidence = torch.tensor([[[0.5, float("nan")]]])
    labels = torch.zeros(1, 1, 2, dtype=torch.long)
    assert calibration_error(count_confidence(confidence, labels, labels, 2)[0]).isnan()
    labels[0, 0, 1] = 255  # no one asks
    assert calibration_error(count_confidence(confidence, labels, labels, 2)[0]) == 0.5
    assert calibration_error(torch.zeros(3, N_BINS + 1)).isnan()


@pytest.mark.parametrize("through", [None, (33, 47)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_upsampled_confidence_equals_full_size_softmax(
    through: tuple[int, int] | None, scale: float
) -> None:
    torch.manual_seed(0)
    low = scale * torch.randn(2, 7, 9, 11)
    resize = LogitResize(Resampling(), through)
    found = label_upsampled(low, (40, 52), resize, with_confidence=True)
    full = resize(low, (40, 52)).double()
    without = label_upsampled(low, (40, 52), resize, with_confidence=False)
    assert torch.equal(found.ids, without.ids)
    expected = full.softmax(1).gather(1, found.ids.long().unsqueeze(1)).squeeze(1)
    assert found.confidence is not None
    torch.testing.assert_close(found.confidence.double(), expected, atol=2e-4, rtol=1e-4)
    assert float(found.confidence.max()) <= 1


def test_confidence_of_logits_and_of_probabilities_agree() -> None:
    logits = torch.randn(2, K, 5, 6)
    of_logits = label(logits, True, True)
    of_chances = label(logits.softmax(1), False, True)
    assert torch.equal(of_logits.ids, of_chances.ids)
    torch.testing.assert_close(of_logits.confidence, of_chances.confidence)
    assert label(logits, True, False).confidence is None


def test_counting_never_asks_the_device() -> None:
    """Meta tensors have no values: whatever asks for one raises."""
    ids = torch.zeros(2, 30, 40, dtype=torch.uint8, device="meta")
    target, sure = ids.long(), ids.float()
    everything = SegmentationMetrics(K).to("meta")
    everything.update(ids, target)
    assert count_images(ids, target, K).shape == (2, 3, K)
    for kind, metric in build_extra(EXTRA_METRICS, K).to("meta").items():
        metric.update(count_extra(kind, Predicted(ids, sure), target, K))  # type: ignore[operator]
    with pytest.raises((RuntimeError, NotImplementedError)):
        everything.confusion.sum().item()


def test_evaluating_never_asks_the_device() -> None:
    from seglab.inference import Inference
    from seglab.models import Segmenter, TimmEncoder
    from seglab.models.heads import FCNHead
    from seglab.task import SegmentationTask

    encoder = TimmEncoder("test_resnet")
    network = Segmenter(encoder, FCNHead(encoder.channels, num_classes=K, channels=8))
    rule = Inference((16, 16))
    task = SegmentationTask(network, K, inference=rule, extra_metrics=EXTRA_METRICS)
    task = task.to("meta").eval()
    image = torch.zeros(2, 3, 32, 40, dtype=torch.uint8, device="meta")
    batch = {"image": image, "mask": image[:, 0], "name": ["a", "b"]}
    with torch.inference_mode():
        found = task.test_step(batch, 0)
    assert found["extra"]["calibration"].shape == (2, 3, 16)


@pytest.mark.parametrize("kind", EXTRA_METRICS)
def test_batches_and_ranks_do_not_matter(kind: str) -> None:
    chances, target = softmax_maps(3, 6), targets(4, 6)
    found = label(chances, False, True)
    one = SummedCounts(kind, K)
    one.update(count_extra(kind, found, target, K))
    ranks = [SummedCounts(kind, K) for _ in range(2)]
    for index in range(6):
        part = Predicted(*(x[index : index + 1] for x in found))
        ranks[index % 5 == 0].update(count_extra(kind, part, target[index : index + 1], K))
    ranks[0].merge_state(ranks[1])
    assert torch.equal(ranks[0].counts, one.counts)
    one.reset()
    assert not one.counts.any()


def test_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'biou': there are boundary_iou, calibration"):
        build_extra(["biou"], K)


BOTH = ("--model.extra_metrics", "[boundary_iou, calibration]")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", params=["whole", "windows and flips"])
def evaluated(
    request: pytest.FixtureRequest,
    fitted: Path,
    run: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, tuple[str, ...]]:
    root = tmp_path_factory.mktemp("tested")
    rule: tuple[str, ...] = ()
    if request.param != "whole":
        rule = ("--model.inference.crop_size", "[16, 16]", "--model.inference.flip", "true")
    args = ("--trainer.accelerator", "cpu", "--trainer.default_root_dir", root)
    run("test", "--ckpt_path", fitted / "checkpoints/last.ckpt", *args, *BOTH, *rule)
    return next(root.rglob("images.csv")).parent, rule


def explicit(fitted: Path, rule: tuple[str, ...]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Full-size probabilities and labels of the test images, by the predictor."""
    import seglab
    from seglab.data import ScenesDataModule
    from seglab.inference import Inference

    model = seglab.load(fitted / "checkpoints/last.ckpt", device="cpu")
    if rule:
        model.task.inference = Inference((16, 16), flip=True)
    data = ScenesDataModule(size=32, train_length=8, val_length=5, num_workers=0)
    data.setup("test")
    samples = sorted((data.test_dataset[i] for i in range(5)), key=lambda s: s["name"])
    chances = [model.predict(s["image"], probabilities=True) for s in samples]
    return chances, [np.asarray(s["mask"]).astype(int) for s in samples]


def test_test_command_leaves_figures_of_the_definitions(
    evaluated: tuple[Path, tuple[str, ...]], fitted: Path
) -> None:
    folder, rule = evaluated
    chances, labels = explicit(fitted, rule)
    counts = np.array(
        [authors_counts(c.argmax(0), t, 8) for c, t in zip(chances, labels, strict=True)]
    )
    hits, labelled, predicted = counts.sum(0)
    with np.errstate(invalid="ignore"):
        iou = hits / (labelled + predicted - hits)
    ece = loop_calibration(np.stack(chances), np.stack(labels))
    results = json.loads((folder / "results.json").read_text())
    assert results["mBoundaryIoU"] == pytest.approx(np.nanmean(iou), abs=1e-9)
    assert results["ECE"] == pytest.approx(ece, abs=1e-5)
    of_classes = [row["BoundaryIoU"] for row in results["classes"]]
    assert [np.nan if v is None else v for v in of_classes] == pytest.approx(iou, nan_ok=True)
    (logged,) = read(folder / "metrics.csv")
    assert float(logged["test/ECE"]) == pytest.approx(ece, abs=1e-5)
    rows = read(folder / "images.csv")
    for row, chance, target, count in zip(rows, chances, labels, counts, strict=True):
        own = loop_calibration(chance[None], target[None])
        assert float(row["ECE"]) == pytest.approx(own, abs=2e-5)
        with np.errstate(invalid="ignore"):
            alone = np.nanmean(count[0] / (count[1] + count[2] - count[0]))
        assert float(row["mBoundaryIoU"]) == pytest.approx(alone, abs=1e-5)


def test_every_printed_figure_has_an_interval(
    evaluated: tuple[Path, tuple[str, ...]],
) -> None:
    folder, rule = evaluated
    results = json.loads((folder / "results.json").read_text())
    averages = {k for k in results if isinstance(results[k], float) and k != "step"}
    assert ("loss" in averages) == (not rule)
    assert set(results["intervals"]) == averages
    rows = {(row["figure"], row["class"]): row for row in read(folder / "intervals.csv")}
    for key in averages:
        low, high = results["intervals"][key]
        row = rows[key, ""]
        assert float(row["value"]) == pytest.approx(results[key], abs=1e-5)
        assert (float(row["low"]), float(row["high"])) == pytest.approx((low, high), abs=1e-6)
    for row in results["classes"]:
        for key, column in {"BoundaryIoU": "BoundaryIoU", "share": "share_of_labels"}.items():
            value = rows[key, row["name"]]["value"]
            assert (float(value) if value else None) == pytest.approx(row[column], abs=1e-5)
    text = (folder / "results.md").read_text()
    assert "95 % over images: mIoU" in text
    assert "| class | IoU | Acc | Dice | BIoU | % of labels |" in text


def test_reliability_file_sums_to_the_error(evaluated: tuple[Path, tuple[str, ...]]) -> None:
    folder, _ = evaluated
    rows = read(folder / "calibration.csv")
    n = sum(int(row["pixels"]) for row in rows)
    error = sum(
        int(row["pixels"]) / n * abs(float(row["accuracy"]) - float(row["mean_confidence"]))
        for row in rows
        if row["accuracy"]
    )
    assert len(rows) == 15
    assert error == pytest.approx(
        json.loads((folder / "results.json").read_text())["ECE"], abs=1e-5
    )


def test_interval_of_the_error_is_that_of_drawn_images() -> None:
    chances, target = softmax_maps(1, 8), targets(5, 8)
    counts = count_extra("calibration", label(chances, False, True), target, K)
    derive: Any = lambda c: {"ECE": calibration_error(c).numpy()}  # noqa: E731
    low, high = bootstrap(counts, n_draws=2000, derive=derive)["ECE"]
    random = np.random.default_rng(1)
    draws = []
    for _ in range(400):
        drawn = random.integers(0, 8, 8)
        draws.append(loop_calibration(chances.numpy()[drawn], target.numpy()[drawn]))
    expected = np.percentile(draws, [2.5, 97.5])
    np.testing.assert_allclose([low, high], expected, atol=0.15 * (expected[1] - expected[0]))


def test_fit_logs_the_extra_figures(fit: Callable[..., Path], logged: Callable[..., Any]) -> None:
    folder = fit(*BOTH)
    assert len(logged(folder, "val/mBoundaryIoU")) == 2
    assert len(logged(folder, "val/ECE")) == 2
    header = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header.index("val/ECE") < min(i for i, c in enumerate(header) if "IoU/" in c)
    assert "mBoundaryIoU" in (folder / "images.csv").read_text().splitlines()[0]
