"""Images, validations and checkpoints are functions of the optimizer step, whatever accumulates."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    WeightAveraging,
)
from step_runs import Diary, Noise, NoiseData, make_task, make_trainer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from seglab.data.dataset import SegmentationDataset, collate

BY_STEPS = {"max_epochs": -1, "check_val_every_n_epoch": None}
FIVE = {**BY_STEPS, "max_steps": 5, "val_check_interval": 2}


def fit(folder: Path, *callbacks: Callback, data: Any = None, **options: Any) -> Diary:
    """Train on 22 images, 8 a step unless said otherwise; two steps an epoch."""
    diary = Diary()
    total = options.pop("total_batch", 8)
    diary.task = make_task(total_batch=total)
    diary.trainer = make_trainer(folder, diary, *callbacks, **options)
    data = data if data is not None else NoiseData()
    feed = {"datamodule": data} if hasattr(data, "setup") else {"train_dataloaders": data}
    diary.trainer.fit(diary.task, **feed)
    return diary


def expected_images(n_steps: int, total: int = 8, length: int = 22) -> list[list[str]]:
    """The endless order by its definition: concatenated permutations, cut every `total`."""
    order = [i for p in range(99) for i in np.random.default_rng([0, p]).permutation(length)]
    return [sorted(map(str, order[total * t : total * (t + 1)])) for t in range(n_steps)]


def weights(diary: Diary) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in diary.task.network.parameters()])


@pytest.mark.parametrize("batch_size", [8, 4, 2, 1])
def test_accumulation_leaves_every_step_as_it_is(tmp_path: Path, batch_size: int) -> None:
    options = {**FIVE, "gradient_clip_val": 0.05}
    diary = fit(tmp_path, data=NoiseData(batch_size=batch_size), **options)
    assert diary.images == expected_images(5)
    assert (diary.validations, diary.inside) == ([2, 4, 5], [])
    whole = fit(tmp_path, data=NoiseData(batch_size=8), **options)
    torch.testing.assert_close(weights(diary), weights(whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("total", "accumulate"), [(8, 1), (8, 4), (None, 4)], ids=["total", "both", "accumulation"]
)
def test_total_and_accumulation_give_the_same_run(
    tmp_path: Path, total: int | None, accumulate: int
) -> None:
    diary = fit(tmp_path, total_batch=total, accumulate_grad_batches=accumulate, **FIVE)
    assert diary.images == expected_images(5)
    assert (diary.validations, diary.inside) == ([2, 4, 5], [])


@pytest.mark.parametrize(
    ("options", "n_steps", "validations"),
    [
        ({"max_epochs": 3}, 6, [2, 4, 6]),
        ({"max_epochs": 3, "check_val_every_n_epoch": 2}, 6, [4, 6]),
        ({"max_epochs": 2, "val_check_interval": 0.5}, 4, [1, 2, 3, 4]),
        ({"max_epochs": 2, "val_check_interval": 0.9}, 4, [1, 2, 3, 4]),
        ({"max_epochs": 2, "val_check_interval": 2}, 4, [2, 4]),
        ({"max_epochs": 3, "limit_train_batches": 1}, 3, [1, 2, 3]),
        ({"max_epochs": 3, "limit_train_batches": 0.7}, 3, [1, 2, 3]),
        ({"max_epochs": 9, "max_steps": 3}, 3, [2, 3]),
        ({"fast_dev_run": True}, 1, [1]),
        ({"fast_dev_run": 2}, 2, [2]),
        ({**BY_STEPS, "max_steps": 3, "val_check_interval": 100}, 3, [3]),
    ],
)
def test_limits_and_intervals_count_steps(
    tmp_path: Path, options: dict[str, Any], n_steps: int, validations: list[int]
) -> None:
    for batch_size in (2, 8):
        diary = fit(tmp_path, data=NoiseData(batch_size=batch_size), **options)
        assert diary.images == expected_images(n_steps)
        assert (diary.validations, diary.inside) == (validations, [])


def test_limits_hold_when_a_trainer_fits_twice(tmp_path: Path) -> None:
    diary = fit(tmp_path, max_epochs=1, limit_train_batches=1)
    diary.trainer.fit_loop.max_epochs = 2
    diary.trainer.fit(diary.task, NoiseData())
    assert diary.images == expected_images(2)


def test_overfitting_repeats_whole_steps(tmp_path: Path) -> None:
    for batch_size in (2, 8):
        data = NoiseData(batch_size=batch_size)
        diary = fit(tmp_path, data=data, max_epochs=3, overfit_batches=1)
        assert diary.images == expected_images(1) * 3


def test_data_smaller_than_the_total_batch(tmp_path: Path) -> None:
    diary = fit(tmp_path, data=NoiseData(3), max_epochs=2)
    assert diary.images == expected_images(2, length=3)
    assert [len(names) for names in diary.images] == [8, 8]


def test_run_ends_with_a_checkpoint_at_its_last_step(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    diary = fit(tmp_path, saver, enable_checkpointing=True, **FIVE)
    assert diary.validations == [2, 4, 5]
    steps = {
        path.name: torch.load(path, weights_only=True)["global_step"]
        for path in (tmp_path / "saved").iterdir()
    }
    assert sorted(steps.values()) == [3, 5]
    assert steps["last.ckpt"] == 5


class StopAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, task: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.should_stop = True


def test_early_stop_waits_for_the_whole_step(tmp_path: Path) -> None:
    diary = fit(tmp_path, StopAt(5), **{**FIVE, "max_steps": 50, "val_check_interval": 50})
    assert diary.images == expected_images(2)
    assert (diary.validations, diary.inside) == ([2], [])


def test_early_stopping_by_a_metric_still_stops(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/mIoU", mode="max", patience=1, min_delta=2.0)
    diary = fit(tmp_path, stopping, **{**FIVE, "max_steps": 50})
    assert diary.validations == [2, 4]


def test_validation_by_the_clock_waits_too(tmp_path: Path) -> None:
    options = {**FIVE, "val_check_interval": timedelta(microseconds=1)}
    diary = fit(tmp_path, **options)
    assert (diary.validations, diary.inside) == ([1, 2, 3, 4, 5], [])


def test_checkpoint_by_the_clock_holds_a_whole_step(tmp_path: Path) -> None:
    saver = ModelCheckpoint(
        tmp_path / "saved", train_time_interval=timedelta(0), save_top_k=-1, filename="{step}"
    )
    fit(tmp_path, saver, enable_checkpointing=True, **FIVE)
    paths = list((tmp_path / "saved").iterdir())
    assert len(paths) >= 5
    for path in paths:
        saved = torch.load(path, weights_only=True)
        counts = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert counts["processed"] == 4 * saved["global_step"]


class Average(WeightAveraging):
    def __init__(self) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(0.5))


def test_average_of_weights_follows_steps(tmp_path: Path) -> None:
    found = [
        weights(fit(tmp_path, Average(), data=NoiseData(batch_size=size), **FIVE))
        for size in (2, 8)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found[0], weights(fit(tmp_path, **FIVE)))


def plain_loader(n_images: int) -> DataLoader:
    dataset = SegmentationDataset(Noise(n_images))
    return DataLoader(dataset, batch_size=2, collate_fn=collate)


def test_foreign_loader_keeps_whole_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"total_batch": None, "accumulate_grad_batches": 2, "max_epochs": 2}
    with caplog.at_level("INFO"):
        diary = fit(tmp_path, data=plain_loader(10), **options)
    assert diary.images == [sorted(map(str, range(s, s + 4))) for s in (0, 4, 0, 4)]
    assert "ends after 2 steps; 1 batches are left over" in caplog.text


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(list(SegmentationDataset(Noise(10))))


def test_stream_of_unknown_length_needs_a_limit(tmp_path: Path) -> None:
    options = {"total_batch": None, "accumulate_grad_batches": 2, "max_steps": 3, "max_epochs": -1}
    loader = DataLoader(Stream(), batch_size=2, collate_fn=collate)
    with pytest.raises(ValueError, match=r"has no length.*set trainer.limit_train_batches"):
        fit(tmp_path, data=loader, **options)
    diary = fit(tmp_path, data=loader, limit_train_batches=2, **options)
    assert [len(names) for names in diary.images] == [4, 4, 4]


def test_epoch_without_a_whole_step_is_refused(tmp_path: Path) -> None:
    options = {"total_batch": None, "accumulate_grad_batches": 9, "max_steps": 3}
    with pytest.raises(ValueError, match="5 batches on this device has no whole step of 9"):
        fit(tmp_path, data=plain_loader(10), **options)


def test_changing_accumulation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="GradientAccumulationScheduler changes the images"):
        fit(tmp_path, GradientAccumulationScheduler({0: 1, 2: 4}), total_batch=None, **FIVE)


def test_interval_longer_than_its_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_check_interval is 3 steps, but an epoch has 2"):
        fit(tmp_path, max_epochs=4, val_check_interval=3)


def test_dropout_depends_on_step_and_place_only(tmp_path: Path) -> None:
    """Not on how many batches one device runs before: the same two batches a step, on 1 or 2."""
    seen: list[list[float]] = []

    class Draws(Callback):
        def on_before_zero_grad(self, *_: Any) -> None:
            seen[-1].append(torch.rand(1).item())

    for _ in range(2):
        seen.append([])
        torch.rand(7)  # another state of the global stream
        fit(tmp_path, Draws(), **FIVE)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == len(seen[0])
