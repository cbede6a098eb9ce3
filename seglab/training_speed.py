"""TrainingSpeed: how a network is run, not what it computes: memory layout and compilation."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from seglab.operators.acceleration import Acceleration, CannotAccelerateError, accelerate

N_TIMED = 10
"""Steps after which the cost of compiling is told from the cost of a step."""


class TrainingSpeed(Callback):
    """Sets a task's network up for speed when `fit` starts. State-dict keys stay as they are.

    Args:
        channels_last: Weights and maps in channels-last layout, which tensor cores want; None does
            so on CUDA. On the CPUs it was measured on, training is slower so.
        compile: Run the network's training passes through `torch.compile`; validation, whose
            images differ in size, stays as it is. What compiling cost is reported after ten steps.
        accelerate: Try `seglab.accelerate` on the first batch: for networks that resize and
            concatenate maps by torch's functions; our own heads have it built in. What came of it
            is reported. The ranks of a run do it all or none.

    Raises:
        ValueError: `compile` together with `accelerate`, which is without effect in compiled code,
            or with gradient checkpointing.

    Other optimizations need no switch: `seglab.optim.build_optimizer` takes fused steps, heads and
    losses never make full-size maps, `--trainer.precision bf16-mixed` is Lightning's.
    """

    def __init__(
        self,
        channels_last: bool | None = None,
        compile: bool = False,  # noqa: A002  # as torch calls it
        accelerate: bool = False,
    ) -> None:
        if compile and accelerate:
            raise ValueError(
                "speed.accelerate has no effect in compiled code: set it or speed.compile to false"
            )
        self.channels_last = channels_last
        self.compile = compile
        self.accelerate = accelerate
        self._acceleration: Acceleration | None = None
        self._is_accelerated = False
        self._ends: list[float] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lay the weights out, before a strategy wraps them and an optimizer takes them."""
        on_cuda = trainer.strategy.root_device.type == "cuda"
        wanted = on_cuda if self.channels_last is None else self.channels_last
        if stage == "fit" and wanted:
            network: Any = pl_module.network
            network.to(memory_format=torch.channels_last)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew; refuse what does not go together."""
        self._ends, self._is_accelerated = [], False
        recomputing = any(getattr(m, "gradient_checkpointing", 0) for m in pl_module.modules())
        if self.compile and recomputing:
            raise ValueError(
                "speed.compile and the network's gradient_checkpointing do not go together: "
                "compiled code decides by itself what to compute again. Set one of them to false"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile, after whatever watches the network as training starts."""
        if self.compile:
            network: Any = pl_module.network
            compiled = torch.compile(type(network).decode)
            # A partial, unlike a closure, follows when the network is copied.
            network.decode = partial(_decode, compiled, network)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when the first step begins; accelerate for batches like it."""
        if self.compile and not self._ends:
            self._ends.append(_now())
        if self.accelerate and not self._is_accelerated:
            self._is_accelerated = True
            self._accelerate(trainer, pl_module.network, batch["image"])

    def _accelerate(self, trainer: Trainer, network: Any, image: Tensor) -> None:
        tolerance = 1e-4 if trainer.precision in ("32-true", "64-true") else 0.02
        devices = [image.device] if image.device.type == "cuda" else []
        try:
            # Training draws the random numbers it would have drawn.
            with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
                self._acceleration = accelerate(network, image, tolerance=tolerance)
            answer = str(self._acceleration)
        except CannotAccelerateError as refusal:
            answer = f"the network stays as it is: {refusal}"
        accepted = self._acceleration is not None
        # Each rank has timed its own trial.
        if not trainer.strategy.reduce_boolean_decision(accepted, all=True) and accepted:
            self._undo()
            answer = "the network stays as it is: the trial of another rank refused it"
        rank_zero_info(f"accelerate: {answer}")

    def _undo(self) -> None:
        if self._acceleration is not None:
            self._acceleration.undo()
            self._acceleration = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Report what compiling cost, once."""
        if self.compile and len(self._ends) <= N_TIMED:
            self._ends.append(_now())
            if len(self._ends) == N_TIMED + 1:
                rank_zero_info(warm_up_report(self._ends))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the network run as it came; its layout stays."""
        vars(pl_module.network).pop("decode", None)
        self._undo()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """As `on_fit_end`."""
        self.on_fit_end(trainer, pl_module)


def _decode(compiled: Any, network: Any, image: Tensor) -> Any:
    if network.training:
        return compiled(network, image)
    return type(network).decode(network, image)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def warm_up_report(ends: list[float]) -> str:
    """Say what compiling cost.

    Args:
        ends: seconds at the start of the first step and at the end of each.

    >>> warm_up_report([0.0, 30.0, 31.0, 31.5, 32.0, 32.5])
    'torch.compile: 30.0 s of warm-up in the first 2 steps, 0.500 s a step since'
    """
    n_first = (len(ends) - 1) // 2
    step = (ends[-1] - ends[n_first]) / (len(ends) - 1 - n_first)
    warm_up = ends[n_first] - ends[0] - n_first * step
    return (
        f"torch.compile: {warm_up:.1f} s of warm-up in the first {n_first} steps, "
        f"{step:.3f} s a step since"
    )
