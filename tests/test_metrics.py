"""SegmentationMetrics against plain numpy, pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterator

import mmseg_reference
import numpy as np
import pytest
import torch
from torch import Tensor

from seglab.metrics import SegmentationMetrics

K = 5


def numpy_oracle(predictions: list[np.ndarray], targets: list[np.ndarray], k: int = K) -> dict:
    """IoU, Acc and Dice by set counts per class over all valid pixels of the whole set."""
    prediction = np.concatenate([p.ravel() for p in predictions]).astype(int)
    target = np.concatenate([t.ravel() for t in targets]).astype(int)
    prediction, target = prediction[target != 255], target[target != 255]
    iou, acc, dice = [], [], []
    for c in range(k):
        p, t = prediction == c, target == c
        both = (p & t).sum()
        iou.append(both / (p | t).sum() if (p | t).any() else np.nan)
        acc.append(both / t.sum() if t.any() else np.nan)
        dice.append(2 * both / (p.sum() + t.sum()) if (p | t).any() else np.nan)
    means = {"mIoU": np.nanmean(iou), "mAcc": np.nanmean(acc), "mDice": np.nanmean(dice)}
    return means | {"aAcc": (prediction == target).mean(), "IoU": iou, "Acc": acc, "Dice": dice}


def batches(seed: int, labels: list[int], predicted: list[int], n: int = 3) -> Iterator[tuple]:
    rng = np.random.default_rng(seed)
    for _ in range(n):
        target = rng.choice(labels, size=(2, 7, 9)).astype(np.uint8)
        right = rng.random(target.shape) < 0.4
        yield (
            np.where(right & (target < K), target, rng.choice(predicted, size=target.shape)),
            target,
        )


def measure(pairs: list[tuple], **kwargs) -> dict:
    metrics = SegmentationMetrics(K, **kwargs)
    for prediction, target in pairs:
        metrics.update(torch.as_tensor(prediction), torch.as_tensor(target))
    return metrics.compute()


def assert_equal(results: dict, expected: dict) -> None:
    for key, value in expected.items():
        np.testing.assert_allclose(np.asarray(results[key]), value, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize(
    ("labels", "predicted"),
    [
        pytest.param([0, 1, 2, 3, 4, 255], [0, 1, 2, 3, 4], id="all present, some ignored"),
        pytest.param([0, 1, 2, 255], [0, 1, 2], id="two classes absent everywhere"),
        pytest.param([0, 1, 2], [0, 1, 2, 4], id="a class predicted but never labelled"),
        pytest.param([0, 1, 2, 3, 4], [0, 1], id="classes never predicted by chance"),
    ],
)
def test_figures_equal_plain_numpy(labels: list[int], predicted: list[int]) -> None:
    pairs = list(batches(0, labels, predicted))
    assert_equal(measure(pairs), numpy_oracle(*map(list, zip(*pairs, strict=True))))


def test_absent_class_is_left_out_but_predicted_one_counts_zero() -> None:
    results = measure([(np.array([[0, 0, 1, 3]]), np.array([[0, 0, 1, 1]]))])
    assert results["IoU"].isnan().tolist() == [False, False, True, False, True]
    assert results["IoU"][3] == 0.0
    assert results["mIoU"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_everything_ignored_gives_nan_not_zero() -> None:
    results = measure([(np.zeros((1, 4, 4), int), np.full((1, 4, 4), 255))])
    assert np.isnan([results[key] for key in ("mIoU", "mAcc", "aAcc", "mDice")]).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_types_agree(dtype: torch.dtype) -> None:
    pairs = list(batches(1, [0, 1, 2, 255], [0, 1, 2]))
    metrics = SegmentationMetrics(K)
    for prediction, target in pairs:
        metrics.update(torch.as_tensor(prediction).to(dtype), torch.as_tensor(target).long())
    assert_equal(metrics.compute(), numpy_oracle(*map(list, zip(*pairs, strict=True))))


def test_many_classes_do_not_overflow_small_integers() -> None:
    target = torch.arange(200, dtype=torch.uint8).view(1, 10, 20)
    metrics = SegmentationMetrics(200)
    metrics.update(target, target)
    assert metrics.compute()["mIoU"] == 1.0


@pytest.fixture(params=[True, "warn"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=request.param == "warn")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_deterministic_algorithms_need_no_giant_memory() -> None:
    # One row of K x K int64 per pixel would be 47 GB here.
    target = torch.randint(150, (1, 512, 512))
    metrics = SegmentationMetrics(150)
    metrics.update(target.flip(1), target)
    assert int(metrics.confusion.sum()) == 512 * 512


class TwoRanks:
    """Stands in for the gather of torch.distributed: each rank asks for the states in order."""

    def __init__(self, first: SegmentationMetrics, second: SegmentationMetrics) -> None:
        names = list(first._reductions)
        self.states = [
            [getattr(metric, name).clone() for metric in (first, second)] for name in names
        ]

    def __call__(self, state: Tensor, group: object) -> list[Tensor]:
        return self.states.pop(0)


def test_two_uneven_ranks_equal_one() -> None:
    pairs = list(batches(2, [0, 1, 2, 3, 255], [0, 1, 2, 4], n=5))
    ranks = [SegmentationMetrics(K, distributed_available_fn=lambda: True) for _ in range(2)]
    for index, (prediction, target) in enumerate(pairs):
        ranks[index % 2].update(torch.as_tensor(prediction), torch.as_tensor(target))
    for rank in ranks:
        rank.dist_sync_fn = TwoRanks(*ranks)
        assert_equal(rank.compute(), numpy_oracle(*map(list, zip(*pairs, strict=True))))


def test_merged_states_equal_one_pass() -> None:
    pairs = list(batches(3, [0, 1, 2, 255], [0, 1, 2, 3], n=4))
    left, right = SegmentationMetrics(K), SegmentationMetrics(K)
    for index, (prediction, target) in enumerate(pairs):
        (left if index < 1 else right).update(torch.as_tensor(prediction), torch.as_tensor(target))
    left.merge_state(right)
    assert_equal(left.compute(), numpy_oracle(*map(list, zip(*pairs, strict=True))))


def test_reset_forgets_and_inference_mode_leaves_no_trap() -> None:
    metrics = SegmentationMetrics(2)
    with torch.inference_mode():
        metrics.update(torch.tensor([[0, 1]]), torch.tensor([[1, 0]]))
        metrics.reset()
        metrics.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    metrics.update(torch.tensor([[1, 1]]), torch.tensor([[1, 255]]))
    assert metrics.compute()["mIoU"] == 1.0


def test_float_casts_do_not_touch_the_counts() -> None:
    metrics = torch.nn.ModuleList([SegmentationMetrics(2)]).half().to(torch.bfloat16)[0]
    metrics.update(
        torch.zeros(1, 70_000, dtype=torch.long), torch.zeros(1, 70_000, dtype=torch.long)
    )
    assert int(metrics.confusion[0, 0]) == 70_000


@pytest.mark.parametrize(("value", "shown"), [(5, "5"), (-1, "-1"), (254, "254")])
def test_label_outside_the_classes_is_named(value: int, shown: str) -> None:
    metrics = SegmentationMetrics(K)
    metrics.update(torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, value]]))
    with pytest.raises(
        ValueError, match=rf"a label holds the value {shown}, but the 5 classes are 0\.\.4"
    ):
        metrics.compute()


def test_prediction_outside_the_classes_is_named() -> None:
    metrics = SegmentationMetrics(K)
    metrics.update(torch.full((1, 2), 9), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="a prediction holds the value 9"):
        metrics.compute()


@pytest.mark.parametrize(
    ("prediction", "match"),
    [
        (torch.zeros(1, 2, 3), "logits.argmax"),
        (torch.zeros(1, 3, 2, dtype=torch.long), r"\(1, 3, 2\) and target \(1, 2, 3\)"),
    ],
)
def test_wrong_input_is_refused_at_once(prediction: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SegmentationMetrics(K).update(prediction, torch.zeros(1, 2, 3, dtype=torch.long))


def test_ignored_value_inside_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=5 and ignore_index=0"):
        SegmentationMetrics(K, ignore_index=0)


def test_table_lists_every_class_and_dashes_absent_ones() -> None:
    metrics = SegmentationMetrics(3)
    metrics.update(torch.tensor([[0, 0]]), torch.tensor([[0, 1]]))
    lines = metrics.table(["road", "sky", "a long class name"]).splitlines()
    assert [line.split()[0] for line in lines] == ["class", "road", "sky", "a", "mean", "all"]
    assert lines[1].split()[1:] == ["50.00", "100.00", "66.67", "50.00"]
    assert lines[3].split()[-4:] == ["-", "-", "-", "0.00"]


def test_prediction_at_an_ignored_pixel_may_be_anything() -> None:
    metrics = SegmentationMetrics(num_classes=2)
    metrics.update(torch.tensor([[[0, 1, 255, -7]]]), torch.tensor([[[0, 1, 255, 255]]]))
    assert metrics.compute()["mIoU"] == 1


def theirs(pairs: list[tuple]) -> dict[str, object]:
    """What MMSegmentation's own metric makes of the same images, one by one."""
    mmseg_reference.builder()
    from mmseg.evaluation.metrics import IoUMetric

    metric = IoUMetric(ignore_index=255, iou_metrics=["mIoU", "mDice", "mFscore"])
    metric.dataset_meta = {"classes": [str(c) for c in range(K)]}
    for prediction, target in pairs:
        for ids, label in zip(prediction, target, strict=True):
            parts = {"pred_sem_seg": ids, "gt_sem_seg": label}
            maps = {key: {"data": torch.as_tensor(x).long()[None]} for key, x in parts.items()}
            metric.process({}, [maps])
    areas = [sum(column) for column in zip(*metric.results, strict=True)]
    with np.errstate(all="ignore"):
        rows = metric.total_area_to_metrics(*areas, metric.metrics)
        return rows | metric.compute_metrics(metric.results)


@pytest.mark.skipif(not mmseg_reference.is_there(), reason="MMSegmentation is not importable")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("labels", "predicted"),
    [
        pytest.param([0, 1, 2, 3, 4, 255], [0, 1, 2, 3, 4], id="all present, some ignored"),
        pytest.param([0, 1, 2, 255], [0, 1, 2], id="two classes absent everywhere"),
        pytest.param([0, 1, 2], [0, 1, 2, 4], id="a class predicted but never labelled"),
        pytest.param([0, 1, 2, 3, 4], [0, 1], id="classes never predicted"),
    ],
)
def test_figures_equal_mmsegmentations(labels: list[int], predicted: list[int]) -> None:
    pairs = list(batches(5, labels, predicted))
    ours, expected = measure(pairs), theirs(pairs)
    for key in ("IoU", "Acc", "Dice", "Precision"):
        np.testing.assert_allclose(ours[key], expected[key], rtol=1e-6, err_msg=key)
    for key in ("mIoU", "mAcc", "aAcc", "mDice", "mPrecision"):
        assert round(100 * ours[key], 2) == pytest.approx(float(expected[key]), abs=0.011), key
    assert ours["mAcc"] == pytest.approx(np.nanmean(expected["Recall"]))
