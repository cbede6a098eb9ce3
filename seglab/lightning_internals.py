"""The private parts of Lightning that seglab needs, in one place, each with its reason.

Lightning 2.6 has no public way to do these. Where one of them changes, the test named here fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only

FIT_LOOP, BATCH_PROGRESS = "fit_loop", "epoch_loop.batch_progress"
"""Where a checkpoint keeps the counters of batches: `checkpoint["loops"][...][...]`."""

VALIDATION_PROGRESS = "epoch_loop.val_loop.batch_progress"
"""The same of a validation. Tests: tests/test_stopping.py."""


class BatchCount(NamedTuple):
    """Batches of this rank in the running epoch."""

    begun: int
    done: int


def count_batches(trainer: Trainer) -> BatchCount:
    """Batches of the running epoch that were begun, and those whose step or share of it is done.

    `trainer.fit_loop.batch_idx` does not tell a batch that runs from one that is done.
    Tests: tests/test_resume.py.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return BatchCount(progress.ready, int(vars(progress)["processed"]))


def count_all_batches(trainer: Trainer) -> int:
    """Batches of this rank that are done since training began, as checkpoints restore them.

    The sampler finds its place by it before the first batch of a resumed run is loaded.
    Tests: tests/data/test_loaders.py.
    """
    return int(vars(trainer.fit_loop.epoch_loop.batch_progress.total)["processed"])


def is_restarting(trainer: Trainer) -> bool:
    """Whether a checkpoint was restored and no batch has run since. Tests: tests/test_resume.py."""
    return bool(trainer.fit_loop.epoch_loop.restarting)


def set_epoch_length(trainer: Trainer, n_batches: int) -> None:
    """Let epochs end after `n_batches`; the trainer counts those of a loader it has set up.

    A limit in batches must be known before the loader is; here it is rounded to whole steps.
    Tests: tests/test_whole_steps.py.
    """
    trainer.fit_loop.max_batches = n_batches


def decide_validation(trainer: Trainer, decide: Callable[[Callable[[], bool]], bool]) -> None:
    """Ask `decide` after every batch whether to validate; it is given Lightning's own answer.

    Lightning counts batches of an epoch and knows neither windows nor the last step.
    Tests: tests/test_whole_steps.py.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    lightnings = type(loop)._should_check_val_fx
    loop._should_check_val_fx = lambda fetcher: decide(lambda: lightnings(loop, fetcher))


def leave_validation_to_lightning(trainer: Trainer) -> None:
    """Undo `decide_validation`."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop.__dict__.pop("_should_check_val_fx", None)


def validates_by_clock(trainer: Trainer) -> bool:
    """Whether `val_check_interval` is a time. Tests: tests/test_whole_steps.py."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def can_stop_early(trainer: Trainer) -> bool:
    """Whether `min_epochs` and `min_steps` are met. Tests: tests/test_whole_steps.py."""
    return bool(trainer.fit_loop._can_stop_early)


def last_saved_step(callback: ModelCheckpoint) -> int:
    """Step of a callback's last checkpoint in this run. Tests: tests/test_whole_steps.py."""
    return int(callback._last_global_step_saved)


def set_last_saved_step(callback: ModelCheckpoint, step: int) -> None:
    """Tell a callback that `step` is saved: after a resume it would save it once more.

    Tests: tests/test_resume.py.
    """
    callback._last_global_step_saved = step


def saves_at_epoch_end(callback: ModelCheckpoint, trainer: Trainer) -> bool:
    """Whether a callback saves as an epoch ends. Tests: tests/test_whole_steps.py."""
    return bool(callback._should_save_on_train_epoch_end(trainer))


def restart_average(callback: WeightAveraging) -> None:
    """Let the next weights be the first of an average. Tests: tests/test_averaging.py."""
    average: Any = callback._average_model
    average.n_averaged.zero_()


def synchronizes_batch_norm(trainer: Trainer) -> bool:
    """Whether batch normalization is over all devices. Tests: tests/test_total_batch.py."""
    connector: Any = trainer._accelerator_connector
    return bool(getattr(connector, "sync_batchnorm", False))


def is_first_process() -> bool:
    """Whether this is rank 0, known before there are ranks. Tests: tests/test_two_processes.py."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def built_by_cli() -> bool:
    """Whether LightningCLI is building a module; it announces the config through a variable.

    Tests: tests/test_checkpoints.py.
    """
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

    return _given_hyperparameters.get() is not None
