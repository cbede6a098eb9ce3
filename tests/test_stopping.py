"""Ctrl-C and SIGTERM end a training with everything saved; continued, it is as if never stopped."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from step_runs import Diary, NoiseData, make_task, make_trainer

from seglab.data.errors import DataError
from seglab.stopping import SIGNALS, RunStoppedError, StopOnSignal

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using:UserWarning"),  # other callbacks
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]

EPOCHS = {"max_steps": -1, "max_epochs": 4, "val_check_interval": 1.0}
EPOCHS |= {"check_val_every_n_epoch": 1}
MOMENTS = (
    *("on_train_epoch_start", "on_train_batch_start", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end", "on_validation_start"),
    *("on_validation_batch_start", "on_validation_batch_end", "on_validation_end"),
)


class Kill(Callback):
    """Sends this process a signal at the n-th call of a hook."""

    def __init__(self, hook: str, count: int, signum: int) -> None:
        self.left, self.signum = count, signum
        setattr(self, hook, self._call)

    def _call(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)


class Validations(Callback):
    """Counts the images of every validation that came to its end."""

    def __init__(self) -> None:
        self.whole: list[tuple[int, int]] = []
        self._n = 0

    def on_validation_start(self, *_: Any) -> None:
        self._n = 0

    def on_validation_batch_end(self, trainer: Trainer, task: Any, out: Any, batch: Any, *_: Any):
        self._n += len(batch["name"])

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.whole.append((trainer.global_step, self._n))


class Data(NoiseData):
    """Three images to validate on, in batches of one."""

    def make_source(self, split: str) -> Any:
        source = super().make_source(split)
        source.length = 22 if split == "train" else 3
        return source


def fit(
    folder: Path, *callbacks: Callback, resume: Path | None = None, **changes: Any
) -> tuple[dict[str, torch.Tensor], Validations]:
    settings = {"max_steps": 7, "max_epochs": -1, "val_check_interval": 3}
    settings |= {"check_val_every_n_epoch": None, **changes}
    task, validations = make_task(norm=True, dropout=0.3, total_batch=8), Validations()
    saver = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    trainer = make_trainer(
        folder,
        validations,
        *callbacks,
        StopOnSignal(),
        saver,
        enable_checkpointing=True,
        **settings,
    )
    data = Data(batch_size=2, eval_batch_size=1)
    trainer.fit(task, data, ckpt_path=resume)
    return task.state_dict(), validations


@pytest.mark.parametrize(
    "changes", [{}, pytest.param(EPOCHS, marks=pytest.mark.slow)], ids=["steps", "epochs"]
)
@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_run_continues_bit_for_bit(
    tmp_path: Path, moment: str, changes: dict[str, Any]
) -> None:
    expected, whole = fit(tmp_path / "whole", **changes)
    for count, signum in ((1, signal.SIGINT), (2, signal.SIGTERM)):
        folder = tmp_path / str(count)
        kill = Kill(moment, count, signum)
        with suppress(RunStoppedError):  # a signal after the last step finds nothing to stop
            fit(folder, kill, **changes)
        assert kill.left <= 0
        resumed, rest = fit(folder, resume=folder / "last.ckpt", **changes)
        for name, value in expected.items():
            assert torch.equal(resumed[name], value), name
        assert rest.whole == [each for each in whole.whole if each in rest.whole]
        assert all(n == 3 for _, n in rest.whole)


def test_stop_names_signal_step_and_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunStoppedError) as caught:
        fit(tmp_path, Kill("on_train_batch_end", 5, signal.SIGTERM))
    stop = caught.value
    assert (stop.signum, stop.step) == (signal.SIGTERM, 2)
    assert stop.checkpoint == tmp_path / "last.ckpt"
    assert torch.load(stop.checkpoint, weights_only=True)["global_step"] == 2


class Unreadable(Callback):
    """Fails as a loader does that meets a broken file."""

    def on_train_batch_start(self, trainer: Trainer, task: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 2 and index % 2:
            raise DataError("image b77.jpg is cut short; replace the file")


def test_unreadable_file_costs_no_step_that_is_done(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path / "whole")
    folder = tmp_path / "broken"
    with pytest.raises(DataError, match="is cut short"):
        fit(folder, Unreadable())
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
    resumed, _ = fit(folder, resume=folder / "last.ckpt")
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name


def test_validation_cut_short_is_repeated_whole(tmp_path: Path) -> None:
    with pytest.raises(RunStoppedError, match="stopped after step 3"):
        fit(tmp_path, Kill("on_validation_batch_start", 2, signal.SIGINT))
    _, rest = fit(tmp_path, resume=tmp_path / "last.ckpt")
    assert rest.whole == [(3, 3), (6, 3), (7, 3)]


def test_nothing_is_written_inside_a_window(tmp_path: Path) -> None:
    diary = Diary()
    with pytest.raises(RunStoppedError, match="stopped after step 2"):
        fit(tmp_path, diary, Kill("on_after_backward", 6, signal.SIGTERM))
    counts = torch.load(tmp_path / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert counts["epoch_loop.batch_progress"]["total"]["processed"] == 2 * 4


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    hook, before = "on_after_backward", [signal.getsignal(signum) for signum in SIGNALS]
    with pytest.raises(SystemExit):
        fit(tmp_path, Kill(hook, 2, signal.SIGTERM), Kill(hook, 3, signal.SIGTERM))
    assert not (tmp_path / "last.ckpt").exists()
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_handlers_are_as_before_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    fit(tmp_path / "whole", max_steps=1)
    with pytest.raises(RunStoppedError):
        fit(tmp_path / "stopped", Kill("on_after_backward", 1, signal.SIGINT))
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


class Break(Callback):
    """What a worker that the same signal has ended does to the next batch."""

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 13:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("DataLoader worker exited unexpectedly")


def test_position_is_saved_when_a_signal_ends_the_workers_too(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path / "whole")
    with pytest.raises(RunStoppedError, match="stopped after step 3"):
        fit(tmp_path, Break())
    resumed, _ = fit(tmp_path, resume=tmp_path / "last.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
