"""The total batch of a recipe holds on any number of devices, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seglab.total_batch import n_accumulated

Run = Callable[..., None]
Logged = Callable[[Path, str], list[float]]


@pytest.mark.parametrize(
    ("total", "per_device", "devices", "expected"), [(16, 2, 8, 1), (16, 2, 1, 8), (8, 8, 1, 1)]
)
def test_accumulation_makes_up_for_missing_devices(
    total: int, per_device: int, devices: int, expected: int
) -> None:
    assert n_accumulated(total, per_device, devices) == expected


@pytest.mark.parametrize(("total", "per_device", "devices"), [(16, 3, 1), (16, 2, 16), (8, 16, 1)])
def test_total_that_cannot_be_matched_is_refused(total: int, per_device: int, devices: int) -> None:
    with pytest.raises(ValueError, match=rf"total_batch is {total}, but {devices} devices x"):
        n_accumulated(total, per_device, devices)


def test_run_accumulates_and_says_so(
    run: Run, tiny: Path, tmp_path: Path, logged: Logged, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--model.total_batch", 8, "--trainer.default_root_dir", tmp_path]
    with caplog.at_level("INFO"):
        run("fit", "--config", tiny, *options)
    (folder,) = tmp_path.glob("tiny/*")
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 2  # two epochs of one step of 2 x 4 images
    assert logged(folder, "lr")[-1] == 0.0  # the schedule ends with the last step
    assert any("total batch 8 = 1 devices x 4 images x 2 accumulated" in m for m in caplog.messages)


def test_validation_interval_in_steps_survives_accumulation(
    run: Run, tiny: Path, tmp_path: Path, logged: Logged
) -> None:
    every = ["--trainer.val_check_interval", 2, "--trainer.check_val_every_n_epoch", "null"]
    length = ["--trainer.max_steps", 4, "--trainer.max_epochs", -1, "--data.train_length", 64]
    options = ["--model.total_batch", 8, "--trainer.default_root_dir", tmp_path]
    run("fit", "--config", tiny, *every, *length, *options)
    (folder,) = tmp_path.glob("tiny/*")
    assert len(logged(folder, "val/mIoU")) == 2  # after steps 2 and 4


def test_other_accumulation_is_refused_in_one_sentence(run: Run, tiny: Path, capsys) -> None:
    options = ["--model.total_batch", 8, "--trainer.accumulate_grad_batches", 3]
    with pytest.raises(SystemExit):
        run("fit", "--config", tiny, *options, "--trainer.logger", "false")
    assert "needs 2 with 1 devices x 4 images" in capsys.readouterr().err
