"""A resumed run equals an uninterrupted one, bit for bit, from any moment."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from step_runs import Diary, NoiseData, make_task, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using:UserWarning"),  # other callbacks
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]

SETTINGS = {"max_steps": 7, "max_epochs": -1, "val_check_interval": 3, "total_batch": 8}


class SaveAtEachMoment(Callback):
    """Writes a checkpoint in each hook that is called during training."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n_written = folder, 0

    def _save(self, trainer: Trainer, moment: str) -> None:
        trainer.save_checkpoint(self.folder / f"{self.n_written:04d}_{moment}.ckpt")
        self.n_written += 1

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "epoch_start")

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "batch_start")

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "after_backward")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "batch_end")

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "validation_start")

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self._save(trainer, "epoch_end")


def fit(
    folder: Path,
    *callbacks: Callback,
    resume: Path | None = None,
    batch_size: int = 2,
    **changes: Any,
) -> tuple[dict[str, torch.Tensor], Diary]:
    """Train a network with batch normalization and dropout; its state and what it saw."""
    settings = {"check_val_every_n_epoch": None, **SETTINGS, **changes}
    task_options = {k: settings.pop(k) for k in ("total_batch", "total_steps") if k in settings}
    task, diary = make_task(norm=True, dropout=0.3, **task_options), Diary()
    trainer = make_trainer(folder, diary, *callbacks, **settings)
    trainer.fit(task, NoiseData(batch_size=batch_size), ckpt_path=resume)
    diary.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    diary.n_steps = trainer.global_step
    return task.state_dict(), diary


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"limit_val_batches": 0},
        {"max_steps": -1, "max_epochs": 4, "val_check_interval": 1.0, "check_val_every_n_epoch": 1},
    ],
    ids=["steps", "without_validation", "epochs"],
)
def test_resume_is_exact_at_random_moments(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected, whole = fit(tmp_path, SaveAtEachMoment(tmp_path), **changes)
    written = sorted(tmp_path.glob("*.ckpt"))
    assert len(written) > 80
    for path in random.Random(0).sample(written, 20 if not changes else 7):
        found, resumed = fit(tmp_path, resume=path, **changes)
        assert_equal(found, expected)
        assert resumed.n_steps == whole.n_steps, path.name
        for step, images in resumed.steps.items():
            assert images == whole.steps[step], path.name
        if resumed.steps:
            later = [step for step in whole.validations if step > min(resumed.steps)]
            assert [s for s in resumed.validations if s > min(resumed.steps)] == later, path.name


class Interrupt(Callback):
    """Ctrl-C in the middle of a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise KeyboardInterrupt


def test_resume_after_ctrl_c_inside_a_window(tmp_path: Path) -> None:
    expected, whole = fit(tmp_path)
    saver = ModelCheckpoint(tmp_path / "saved", filename="stopped", save_on_exception=True)
    with pytest.raises(SystemExit):
        fit(tmp_path, saver, Interrupt(17), enable_checkpointing=True)
    found, resumed = fit(tmp_path, resume=tmp_path / "saved" / "stopped.ckpt")
    assert min(resumed.steps) == 4  # batch 17 is the second of the fifth step
    assert_equal(found, expected)
    assert resumed.validations == [6, 7]
    assert whole.validations == [3, 6, 7]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Checkpoint of step 4, a step by 2 x 4 images."""
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, filename="four")
    fit(tmp_path, saver, enable_checkpointing=True)
    return tmp_path / "saved" / "four.ckpt"


def test_resume_on_other_devices_sees_the_same_images(tmp_path: Path, written: Path) -> None:
    _, whole = fit(tmp_path)
    for batch_size in (8, 4, 1):
        _, resumed = fit(tmp_path, resume=written, batch_size=batch_size)
        assert resumed.images == whole.images[4:]
        assert resumed.validations == [6, 7]


def test_resume_does_not_save_the_same_step_again(tmp_path: Path, written: Path) -> None:
    folder = tmp_path / "again"
    saver = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(tmp_path, saver, resume=written, enable_checkpointing=True)
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]  # of step 7
    shutil.rmtree(folder)


def test_resume_with_another_total_batch_is_refused(tmp_path: Path, written: Path) -> None:
    with pytest.raises(
        ValueError, match=r"trained with 8 images a step, this run has 4: set --mod"
    ):
        fit(tmp_path, resume=written, total_batch=4)


def test_longer_training_asks_what_the_schedule_is_to_do(tmp_path: Path, written: Path) -> None:
    match = r"ends after 7 steps, this training after 9: .*total_steps 7 keeps .*total_steps 9 str"
    with pytest.raises(ValueError, match=match):
        fit(tmp_path, resume=written, max_steps=9)


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, task: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_schedule_can_be_kept_or_stretched(tmp_path: Path, written: Path) -> None:
    _, kept = fit(tmp_path, resume=written, max_steps=9, total_steps=7)
    assert kept.rates == [0.01]  # eta_min since step 7
    assert kept.n_steps == 9

    rates = Rates()
    fit(tmp_path, rates, resume=written, max_steps=9, total_steps=9)
    expected = [0.49 * (1 - step / 8) + 0.01 for step in range(4, 9)]
    assert rates.seen == pytest.approx(expected)


def test_extension_continues_a_half_done_epoch(tmp_path: Path) -> None:
    """Step 3 is the first of an epoch of two; its validations stay those of an unbroken run."""
    by_epoch = {"check_val_every_n_epoch": 2, "val_check_interval": 1.0, "total_steps": 8}
    _, whole = fit(tmp_path, **by_epoch, max_steps=8)
    fit(tmp_path, SaveLast(tmp_path / "three.ckpt"), **by_epoch, max_steps=3)
    _, resumed = fit(tmp_path, resume=tmp_path / "three.ckpt", **by_epoch, max_steps=8)
    assert resumed.images == whole.images[3:]
    assert resumed.validations == whole.validations == [4, 8]


class SaveLast(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)
