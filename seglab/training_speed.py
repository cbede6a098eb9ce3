"""TrainingSpeed: how a network is run, not what it computes: memory layout and compilation."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from seglab.acceleration import Acceleration, CannotAccelerateError, accelerate

N_TIMED = 10
"""Steps after which the cost of compiling is told from the cost of a step."""


class TrainingSpeed(Callback):
    """Sets a task's network up for speed when `fit` starts. State-dict keys stay as they are.

    Args:
        channels_last: Weights and maps in channels-last layout, which tensor cores want; None does
            so on CUDA. On the CPUs it was measured on, training is slower so.
        compile: Run the network's training passes through `torch.compile`; validation, whose
            images differ in size, stays as it is. What compiling cost is reported after ten steps.
        accelerate: Try `seglab.accelerate` on the first batch: for networks of
            segmentation_models_pytorch; our own heads have it built in. What came of it is
            reported.

    Raises:
        ValueError: Both `compile` and `accelerate`, which is without effect in compiled code.

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
        self._ends: list[float] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay the weights out; before a checkpoint's optimizer state arrives."""
        on_cuda = trainer.strategy.root_device.type == "cuda"
        if on_cuda if self.channels_last is None else self.channels_last:
            network: Any = pl_module.network
            network.to(memory_format=torch.channels_last)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile, after whatever watches the network as training starts."""
        for optimizer in trainer.optimizers:
            match_layout_(optimizer)
        if self.compile:
            network: Any = pl_module.network
            network.decode = _compiled_in_training(network)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when the first step begins; accelerate for batches like it."""
        if self.compile and not self._ends:
            self._ends.append(time.perf_counter())
        if self.accelerate:
            self.accelerate = False
            self._try_to_accelerate(pl_module, batch["image"])

    def _try_to_accelerate(self, pl_module: LightningModule, image: Tensor) -> None:
        devices = [image.device] if image.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):  # training draws what it would have drawn
                self._acceleration = accelerate(pl_module.network, image)  # type: ignore[arg-type]
        except CannotAccelerateError as refusal:
            rank_zero_info(f"accelerate: the network stays as it is: {refusal}")
        else:
            rank_zero_info(f"accelerate: {self._acceleration}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Report what compiling cost, once."""
        if self.compile and len(self._ends) <= N_TIMED:
            self._ends.append(time.perf_counter())
            if len(self._ends) == N_TIMED + 1:
                rank_zero_info(warm_up_report(self._ends))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the network as it came."""
        vars(pl_module.network).pop("decode", None)
        if self._acceleration is not None:
            self._acceleration.undo()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """As `on_fit_end`."""
        self.on_fit_end(trainer, pl_module)


def _compiled_in_training(network: nn.Module) -> Any:
    plain: Any = network.decode
    compiled: Any = torch.compile(plain)

    def decode(image: Tensor) -> Any:
        return compiled(image) if network.training else plain(image)

    return decode


@torch.no_grad()
def match_layout_(optimizer: Optimizer) -> None:
    """Give the optimizer's state the layout of its weights, which fused steps take for granted.

    A checkpoint's state comes in the layout it was saved in.

    >>> weight = nn.Parameter(torch.zeros(2, 3, 4, 4))
    >>> optimizer = torch.optim.SGD([weight], momentum=0.9)
    >>> momentum = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    >>> optimizer.state[weight]["momentum_buffer"] = momentum
    >>> match_layout_(optimizer)
    >>> optimizer.state[weight]["momentum_buffer"].is_contiguous()
    True
    """
    for weight, state in optimizer.state.items():
        for name, value in state.items():
            like_weight = isinstance(value, Tensor) and value.shape == weight.shape
            if like_weight and value.stride() != weight.stride():
                state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


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
