"""ScaleEqualizationCallback: equalizes a LightningModule's network when `fit` starts.

Works in a `lightning.pytorch.Trainer` and in a `pytorch_lightning.Trainer`, hence no isinstance on
either's classes. What is given up: strategies that shard the model or restore it after set-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from .batches import find_input
from .equalize import MODES, Mode, equalize_
from .finding import DEFAULT_EXCLUDE
from .fusion import AlreadyEqualizedError, ScaleEqualizationError
from .loaders import calibration_loader
from .reparametrization import bake_, reparametrize_, reparametrized, trained_weight
from .report import Report
from .state import same_random_streams

FILE_NAME = "scale_equalization.json"


class ScaleEqualizationCallback(Callback):
    """Find, measure and equalize every feature fusion before the first training step.

    The samples come from a second loader over the training set; the trainer's own loader, random
    streams, buffers and flags stay as they are. Checkpoints hold plain weights in every mode.
    A resumed run is never equalized again, nor a LightningModule with a true attribute
    `scale_equalized` (for whoever loads weights from an equalized run).

    Args:
        mode: "fold" changes the weights once; "reparametrize" trains V with W = V / std, which has
            exactly the dynamics of the explicit equalizer; "off" measures and reports only.
        tolerance: Stop when every std is known this well (relative, 95 % confidence); 0 uses the
            whole training set.
        max_batches: At most so many batches over all ranks.
        include: Shell patterns of the consumers' names to take.
        exclude: Shell patterns to leave alone; by default the encoder.
        center: Fold the means into the biases too; exact only away from zero-padded borders.
        preserve_norm: Keep the norm of every fusion weight; only the ratios of slices change.
        placebo: Multiply every slice by one constant that changes the norm as "fold" does: the
            control for the effective learning rate.
        sums: Bring the summands of sum fusions (FPN, LinkNet) to one scale too; not in the paper.
        batch_to_input: From a batch to the network's input, if the batch is of another form than
            `scale_equalization.batches.find_input` knows. A LightningModule may define
            `scale_equalization_input(batch)` instead.
        forward: Called as ``forward(pl_module, batch)`` in place of ``pl_module(input)``.
        force: Equalize layers too that were equalized or trained before.
        seed: Of the choice of samples.
        verbose: Print the table on rank 0.

    Attributes:
        report: The report, from `on_fit_start` on.
    """

    def __init__(
        self,
        mode: Mode = "fold",
        tolerance: float = 0.01,
        max_batches: int | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        center: bool = False,
        preserve_norm: bool = False,
        placebo: bool = False,
        sums: bool = False,
        batch_to_input: Callable[[Any], Any] | None = None,
        forward: Callable[[Any, Any], Any] | None = None,
        force: bool = False,
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")
        self.mode: Mode = mode
        self.tolerance, self.max_batches = tolerance, max_batches
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.center, self.preserve_norm, self.placebo = center, preserve_norm, placebo
        self.sums = sums
        self.batch_to_input, self.forward = batch_to_input, forward
        self.force, self.seed, self.verbose = force, seed, verbose
        self.report: Report | None = None
        self._restored: dict[str, Any] | None = None
        self._network: ref[nn.Module] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier checkpoint said: only the one being loaded now counts."""
        self._restored = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Equalize, once."""
        self.equalize(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave plain weights behind."""
        bake_(pl_module)

    def equalize(self, trainer: Trainer, pl_module: LightningModule) -> Report:
        """Find, measure and apply on a trainer that is set up; or go on where a run stopped."""
        _require_whole_weights(trainer)
        if self._restored is not None:
            self._resume(trainer, pl_module, self._restored)
        elif self._equalized_network() is pl_module:
            self._continue(trainer, pl_module)
        else:
            self._begin(trainer, pl_module)
        self._network = ref(pl_module)
        assert self.report is not None
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty before equalization. Tensors and plain values only."""
        network = self._equalized_network()
        if self.report is None or network is None:
            return {}
        raw = {}
        if reparametrized(network):
            raw = {f.name: trained_weight(network, f) for f in self.report.fusions}
        return {
            "mode": self.mode,
            "report": self.report.to_dict(),
            "raw": {name: values.detach().clone() for name, values in raw.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state until the fit starts."""
        self._restored = state_dict

    def _equalized_network(self) -> nn.Module | None:
        return self._network() if self._network else None

    # -- the three ways a fit can start ----------------------------------------------------

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(pl_module, "scale_equalized", False) and self.mode != "off" and not self.force:
            raise AlreadyEqualizedError(
                "the network's weights come from a file that says they are equalized already: "
                'use mode="off", or pass force=True if you mean it'
            )
        batches = self._batches(trainer)
        with (
            trainer.precision_plugin.forward_context(),
            same_random_streams(),
            _progress(self._bar(trainer, batches)) as step,
        ):
            self.report = equalize_(
                pl_module,
                _Moved(trainer, batches),
                mode=self.mode,
                forward=self._forward,
                tolerance=self.tolerance,
                include=self.include,
                exclude=self.exclude,
                center=self.center,
                preserve_norm=self.preserve_norm,
                placebo=self.placebo,
                sums=self.sums,
                force=self.force,
                progress=step,
            )
        _refresh_averages(trainer, pl_module, self.report)
        self._publish(trainer)

    def _resume(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
        if state["mode"] != self.mode:
            raise ScaleEqualizationError(
                f"the checkpoint was trained with mode={state['mode']!r}, this run has "
                f"mode={self.mode!r}: resume in the same mode, or start a new run"
            )
        self.report = Report.from_dict(state["report"])
        self._continue(trainer, pl_module)
        for fusion in self.report.fusions:
            if fusion.name in state["raw"]:
                _copy_values(trained_weight(pl_module, fusion), state["raw"][fusion.name])

    def _continue(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights are equalized already: only a reparametrization has to be set up again."""
        if self.mode != "reparametrize":
            return
        assert self.report is not None
        for network in (pl_module, *_averages(trainer)):
            if not reparametrized(network):
                reparametrize_(network, self.report, continued=True)

    # -- the pieces of a beginning ---------------------------------------------------------

    def _batches(self, trainer: Trainer) -> Any:
        source = trainer.train_dataloader
        if source is None:
            source = trainer.fit_loop._data_source.dataloader()
        overfit = float(getattr(trainer, "overfit_batches", 0.0))
        limit = 1 if getattr(trainer, "fast_dev_run", False) else self.max_batches
        if overfit >= 1:
            limit = int(overfit)
        return calibration_loader(
            source,
            max_batches=limit,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            seed=self.seed,
            shuffle=not overfit,
        )

    def _forward(self, pl_module: Any, batch: Any) -> Any:
        if self.forward is not None:
            return self.forward(pl_module, batch)
        own = getattr(pl_module, "scale_equalization_input", None)
        to_input: Callable[[Any], Any] = self.batch_to_input or own or find_input
        try:
            return pl_module(to_input(batch))
        except NotImplementedError as error:
            raise ScaleEqualizationError(
                f"{type(pl_module).__name__} has no forward() to watch: define one, or give "
                "ScaleEqualizationCallback(forward=lambda module, batch: ...)"
            ) from error

    def _bar(self, trainer: Trainer, batches: Any) -> int | None:
        if not (self.verbose and trainer.is_global_zero):
            return None
        return len(batches) if hasattr(batches, "__len__") else 0

    def _publish(self, trainer: Trainer) -> None:
        """Table to the console, JSON beside the logs, one number a branch to every logger."""
        assert self.report is not None
        folder = trainer.log_dir  # broadcast from rank 0: every rank has to ask
        if not trainer.is_global_zero:
            return
        if self.verbose:
            rank_zero_info(str(self.report))
        if folder and trainer.loggers and not getattr(trainer, "fast_dev_run", False):
            self.report.save(Path(folder) / FILE_NAME)
        for logger in trainer.loggers:
            logger.log_metrics(_metrics(self.report), step=0)


def _metrics(report: Report) -> dict[str, float]:
    return {
        f"scale_equalization/{row['fusion']}/{row['branch']}/{key}": row[key]
        for row in report.rows
        for key in ("std", "scale")
    }


def _require_whole_weights(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if getattr(strategy, "restore_checkpoint_after_setup", False):
        raise ScaleEqualizationError(
            f"{type(strategy).__name__} shards the weights or restores them after set-up, so they "
            "cannot be equalized in fit: write an equalized initial checkpoint on one device "
            "first (equalize_ and torch.save), then train from it with this callback left out"
        )


class _Moved:
    """Batches on the device, through the module's own transfer hooks, again and again."""

    def __init__(self, trainer: Trainer, batches: Any) -> None:
        self.trainer, self.batches = trainer, batches

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield self.trainer.strategy.batch_to_device(
                self.trainer.precision_plugin.convert_input(batch), dataloader_idx=0
            )


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int], Any] | None]:
    """A bar on a terminal; `total` None for none, 0 for an unknown number of batches."""
    if total is None:
        yield None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(
        total=total or None, desc="Measuring branch scales", disable=None, leave=False
    ) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show


def _refresh_averages(trainer: Trainer, pl_module: LightningModule, report: Report) -> None:
    """Weight averaging copied the model in `setup`, before it was equalized: copy again.

    Every validation before the first average would else see the weights as they were.
    """
    if report.mode == "off":
        return
    for copy in _averages(trainer):
        if report.mode == "reparametrize":
            reparametrize_(copy, report)
        for old, new in zip(copy.parameters(), pl_module.parameters(), strict=True):
            _copy_values(old, new)


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    """The copies of the network that weight averaging callbacks keep."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average: Any = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield getattr(average, "module", average)


def _copy_values(old: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        old.copy_(new)
