"""StopOnSignal: Ctrl-C and SIGTERM end a training at a step's border, with everything saved.

The first signal waits for the border: the end of the step, or the next batch of a validation, which
the continued run then repeats from its beginning (several ranks wait for the validation's end). The
second one stops at once and saves nothing.
All ranks stop at the same place, whichever of them got the signal.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from seglab import lightning_internals as internals
from seglab.course import repeat_validation
from seglab.whole_steps import WholeSteps

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nstopping as soon as this step is done; once more stops at once, unsaved\n"


class RunStoppedError(Exception):
    """A training ended because of a signal.

    Args:
        signum: The signal.
        step: Optimizer steps that are done.
        checkpoint: Where they are saved; None if the run keeps no checkpoints.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        where = f"saved in {checkpoint}" if checkpoint else "not saved: the run has no checkpoints"
        super().__init__(f"stopped after step {step}, {where}")
        self.signum, self.step, self.checkpoint = signum, step, checkpoint


class StopOnSignal(Callback):
    """Saves `last.ckpt` beside the run's other checkpoints and raises `RunStoppedError`."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._handlers: dict[int, Any] = {}
        self._n_batches = 0.0
        self._repeats_validation = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen; Lightning has settled its own handler of SIGTERM by now."""
        self._signum = signal.SIGTERM if trainer.received_sigterm else None
        if threading.current_thread() is threading.main_thread():  # no other hears signals
            self._handlers = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop between two steps, when the validation after the first is over."""
        if internals.count_batches(trainer).done % trainer.accumulate_grad_batches == 0:
            self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches; several ranks have different numbers and wait for the end."""
        averages = any(isinstance(c, WeightAveraging) for c in _callbacks(trainer))
        may_stop = bool(self._handlers) and trainer.world_size == 1 and not averages
        self._n_batches = sum(trainer.num_val_batches) if may_stop else 0.0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *_: Any,
    ) -> None:
        """Stop inside a validation: those of large sets take minutes, a machine's notice seconds.

        `WeightAveraging` has its averages in the network then, so there it waits.
        """
        if self._handlers and batch_idx + 1 < self._n_batches:
            self._repeats_validation = True
            self._stop_if_asked(trainer)
            self._repeats_validation = False

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let a validation that was cut short begin anew."""
        if self._repeats_validation:
            repeat_validation(checkpoint["loops"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop listening."""
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """As `on_train_end`; what breaks after a signal is a worker that it has ended."""
        self._restore_handlers()
        alone = trainer.world_size == 1  # other ranks would have to save too
        broken = isinstance(exception, RuntimeError) and self._signum is not None
        if broken and alone and not _updates_weights(trainer):
            self._save_and_stop(trainer)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._signum is not None:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt
        self._signum = signum
        if internals.is_first_process():
            os.write(2, NOTICE)  # `print` may be at work in the very place that was interrupted

    def _stop_if_asked(self, trainer: Trainer) -> None:
        asked = trainer.strategy.reduce_boolean_decision(self._signum is not None, all=False)
        if asked:
            self._save_and_stop(trainer)

    def _save_and_stop(self, trainer: Trainer) -> None:
        checkpoint = _last_checkpoint(trainer)
        if checkpoint is not None:
            trainer.save_checkpoint(checkpoint)
        raise RunStoppedError(self._signum or signal.SIGTERM, trainer.global_step, checkpoint)

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}


def _last_checkpoint(trainer: Trainer) -> Path | None:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            return Path(callback.dirpath, "last.ckpt")
    return None


def _updates_weights(trainer: Trainer) -> bool:
    return any(c.updates_weights for c in _callbacks(trainer) if isinstance(c, WholeSteps))


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]
