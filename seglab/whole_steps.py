"""WholeSteps: validations, checkpoints and random draws belong to optimizer steps, not to batches.

With gradient accumulation a step is a window of batches. Nothing happens inside a window: epochs
end at its border, validations and early stops wait for it, and a checkpoint written inside (after
Ctrl-C, say) holds the state of its border. A step of the run is then the same on one device and on
eight, and a resumed run equals an uninterrupted one from any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from seglab import lightning_internals as internals
from seglab.course import Course, continue_course, rewind, settle_epoch
from seglab.seeds import global_seed, seed_draws, seed_of
from seglab.step_plan import StepPlan, plan_steps
from seglab.torch_internals import buffers_of, is_saved


class WholeSteps(Callback):
    """Keeps a task's training in whole optimizer steps; the task adds it by itself."""

    def __init__(self) -> None:
        self._plan: StepPlan | None = None
        self._seed: int | None = None
        self._validated_step: int | None = -1
        self._updates_weights = False
        self._has_left_border = False
        self._stop_at_border = False
        self._buffers: dict[str, tuple[dict[str, Tensor | None], str]] = {}
        self._at_border: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over the decision when to validate."""
        if stage == "fit":
            self._seed = global_seed()
            internals.decide_validation(trainer, lambda own: self._validates(trainer, own))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the decision back."""
        internals.leave_validation_to_lightning(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where the data have a seed of their own."""
        run, data = global_seed(), getattr(_datamodule(trainer), "seed", None)
        if None not in (run, data) and run != data:
            rank_zero_info(
                f"seed_everything is {run} (initial weights, dropout, calibration), data.seed is "
                f"{data} (order, crops, flips and colours)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Round the epoch to whole steps and settle what happens after which step."""
        if self._seed is None:  # nobody seeded and no checkpoint says: the draws of this process
            self._seed = torch.initial_seed()
        self._buffers = dict(_saved_buffers(pl_module))
        self._settle(trainer)
        if trainer.global_step:  # resumed
            for callback in _checkpoint_callbacks(trainer):
                internals.set_last_saved_step(callback, trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loader may have been set up anew."""
        self._settle(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed dropout with the place of the batch in the run; keep the state of the border."""
        share = internals.count_batches(trainer).done % trainer.accumulate_grad_batches
        if share == 0:
            self._keep_buffers()
            self._has_left_border = True
        place = share * trainer.world_size + trainer.global_rank
        seed = seed_of(int(self._seed or 0), trainer.global_step, place)
        seed_draws(seed, trainer.strategy.root_device)

    @property
    def updates_weights(self) -> bool:
        """Whether the weights are neither before nor after a step."""
        return self._updates_weights

    def on_before_optimizer_step(self, *_: Any) -> None:
        """From here to the end of the batch the weights are neither before nor after the step."""
        self._updates_weights = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Let whatever wants to stop wait for the end of the window."""
        self._updates_weights = False
        if self._is_inside(trainer):
            self._stop_at_border |= trainer.should_stop
            trainer.should_stop = False
            return
        self._has_left_border = False
        if self._stop_at_border:
            self._stop_at_border, trainer.should_stop = False, True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step, unless a checkpoint callback is about to."""
        is_last = self._plan is not None and trainer.global_step == self._plan.last_step
        savers = _checkpoint_callbacks(trainer)
        if (is_last or trainer.should_stop) and not any(
            internals.saves_at_epoch_end(saver, trainer) for saver in savers
        ):
            _write_last_step(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last step if no checkpoint callback did."""
        _write_last_step(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed of dropout; `on_save_checkpoint` adds the rest."""
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the same draws, unless the run has a seed of its own."""
        self._seed = global_seed() if global_seed() is not None else state_dict["seed"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the course of the run; inside a window, write the state of its border."""
        batches = internals.count_batches(trainer)
        is_inside = self._is_inside(trainer) or batches.begun != batches.done
        if is_inside:
            if self._updates_weights:
                rank_zero_warn(
                    "this checkpoint was written while the weights of step "
                    f"{trainer.global_step + 1} were being updated and may not resume exactly: "
                    "resume from an earlier one."
                )
            rewind(checkpoint["loops"], trainer.accumulate_grad_batches)
            # `WeightAveraging` has put the averages into "state_dict" by now, or will do so.
            weights = checkpoint.get("current_model_state", checkpoint["state_dict"])
            if self._has_left_border:
                weights |= {name: value.clone() for name, value in self._at_border.items()}
        is_between = settle_epoch(checkpoint["loops"], trainer.num_training_batches)
        is_validated = (
            self._validated_step == trainer.global_step and not is_inside and not is_between
        )
        course = Course.of(trainer)._asdict() | {"is_validated": is_validated}
        checkpoint["callbacks"][self.state_key] |= course

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse another course; count the batches done as those of this number of devices."""
        state = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn != "fit":
            return
        if state is None:  # written by another task or before there were whole steps
            self._validated_step = None
            return
        continue_course(Course.of(trainer), state, checkpoint["loops"])
        self._validated_step = checkpoint["global_step"] if state["is_validated"] else -1

    # -- the pieces ------------------------------------------------------------------------

    def _settle(self, trainer: Trainer) -> None:
        n_batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
        if n_batches == float("inf"):
            if window > 1:
                raise ValueError(
                    f"the training data has no length, so an epoch may end inside the {window} "
                    "batches of a step: set trainer.limit_train_batches, in steps."
                )
            self._plan = None
            return
        n_steps = int(n_batches) // window
        if not n_steps:
            raise ValueError(
                f"an epoch of {n_batches} batches on this device has no whole step of {window}: "
                "lower trainer.accumulate_grad_batches or model.total_batch, or raise "
                "trainer.limit_train_batches."
            )
        if n_batches % window:
            rank_zero_info(
                f"an epoch ends after {n_steps} steps; {int(n_batches) % window} batches are left "
                "over, less than a step"
            )
            internals.set_epoch_length(trainer, n_steps * window)
        self._plan = plan_steps(trainer, n_steps)

    def _validates(self, trainer: Trainer, lightnings_own: Callable[[], bool]) -> bool:
        if internals.is_restarting(trainer):  # asked whether the checkpoint was written in one
            known = self._validated_step is not None
            return self._validated_step == trainer.global_step if known else lightnings_own()
        if self._is_inside(trainer) or not trainer.enable_validation:
            return False
        is_due = self._is_due(trainer, lightnings_own)
        if is_due:
            self._validated_step = trainer.global_step
        return is_due

    def _is_due(self, trainer: Trainer, lightnings_own: Callable[[], bool]) -> bool:
        if trainer.should_stop and internals.can_stop_early(trainer):
            return True
        if self._plan is None:
            return lightnings_own() or trainer.global_step == trainer.max_steps
        if internals.validates_by_clock(trainer) and trainer.global_step != self._plan.last_step:
            return lightnings_own()
        return self._plan.validates_after(trainer.global_step)

    def _is_inside(self, trainer: Trainer) -> bool:
        """Whether gradients of this step have been accumulated that no step has taken yet."""
        return internals.count_batches(trainer).done % trainer.accumulate_grad_batches != 0

    @torch.no_grad()
    def _keep_buffers(self) -> None:
        """Batch statistics change with every batch, all else with the step."""
        live = {name: owner[key] for name, (owner, key) in self._buffers.items()}
        for name, value in live.items():
            if value is None:
                continue
            kept = self._at_border.get(name)
            if kept is None or kept.shape != value.shape or kept.device != value.device:
                self._at_border[name] = value.clone()
            else:
                kept.copy_(value)


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Tensor | None], str]]]:
    """Name of each buffer that a checkpoint holds, and where its value is found."""
    for prefix, owner in module.named_modules():
        buffers = buffers_of(owner)
        for key in buffers:
            if is_saved(owner, key):
                yield f"{prefix}.{key}".lstrip("."), (buffers, key)


def _checkpoint_callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


def _write_last_step(trainer: Trainer) -> None:
    savers, step = _checkpoint_callbacks(trainer), trainer.global_step
    if not savers or getattr(trainer, "fast_dev_run", False) or not step:
        return
    if all(internals.last_saved_step(saver) != step for saver in savers):
        path = Path(str(savers[0].dirpath), "last.ckpt")
        trainer.save_checkpoint(path, savers[0].save_weights_only)
        for saver in savers:
            internals.set_last_saved_step(saver, step)
        rank_zero_info(f"the last step, {step}, is in {path}")


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
