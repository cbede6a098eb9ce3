"""ScaleEqualizationCallback: equalizes a LightningModule's network when `fit` starts.

Works in a `lightning.pytorch.Trainer` and in a `pytorch_lightning.Trainer`, hence no isinstance on
either's classes. What is given up: strategies that shard the model or restore it after set-up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from .calibration import calibration
from .copies import find_copies, stale_copies
from .eligibility import counts_as_equalized
from .equalize import equalize_as
from .equivalence import require_lr_ratios
from .finding import DEFAULT_EXCLUDE
from .framework_internals import averaged_copies, resumed_step
from .fusion import ScaleEqualizationError
from .layers import layer_of, layers_by_name, note_as_left
from .options import Mode, Options
from .reparametrization import bake_, reparametrize_, reparametrized, trained_weight
from .report import Report

FILE_NAME = "scale_equalization.json"
LEFT_ALONE = (
    "left alone: the weights come from a file that says they are equalized already; measured only "
    "(force=True equalizes them anyway)"
)


class ScaleEqualizationCallback(Callback):
    """Find, measure and equalize every feature fusion before the first training step.

    The batches are drawn from the user's own data set and samplers, in the modes (train or eval)
    that the modules have when the fit starts; loaders, random streams, buffers, flags and
    attributes are then set back. Checkpoints hold plain weights in every mode.
    A resumed run is never equalized again, nor are layers that were trained or equalized before,
    nor a LightningModule with a true attribute `scale_equalized` (for whoever loads weights from an
    equalized run): the report says so.

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
        loader: Batches to measure instead of those of the training loader: any iterable, each rank
            its own. An iterator is used up.
        force: Equalize layers too that were equalized or trained before.
        seed: Of the order of batches; None: what Lightning's `seed_everything` was given, else 0.
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
        loader: Iterable[Any] | None = None,
        force: bool = False,
        seed: int | None = None,
        verbose: bool = True,
    ) -> None:
        self.options = Options(
            mode=mode,
            tolerance=tolerance,
            max_batches=max_batches,
            include=include,
            exclude=exclude,
            center=center,
            preserve_norm=preserve_norm,
            placebo=placebo,
            sums=sums,
            force=force,
        )
        self.batch_to_input, self.forward, self.loader = batch_to_input, forward, loader
        self.seed, self.verbose = seed, verbose
        self.report: Report | None = None
        self._restored: dict[str, Any] | None = None
        self._network: ref[nn.Module] | None = None

    @property
    def mode(self) -> Mode:
        """What is done with the scales: "fold", "reparametrize" or "off"."""
        return self.options.mode

    def __getstate__(self) -> dict[str, Any]:
        """Everything but which network was equalized: a reference to it would hold only here."""
        return {**self.__dict__, "_network": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier checkpoint said: only the one being loaded now counts."""
        self._restored = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Equalize, once."""
        self.equalize(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave plain weights behind."""
        bake_(pl_module)
        layers = layers_by_name(pl_module)
        for fusion in self.report.fusions if self.report else ():
            if fusion.name in layers:
                note_as_left(layers[fusion.name])

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Check that a schedule has kept the ratios of `equivalent_param_groups`, if it is used."""
        require_lr_ratios(optimizer.param_groups)

    def equalize(self, trainer: Trainer, pl_module: LightningModule) -> Report:
        """Find, measure and apply on a trainer that is set up; or go on where a run stopped."""
        _require_whole_weights(trainer)
        if self._restored is not None:
            self._resume(trainer, pl_module, self._restored)
        elif self._equalized_network() is pl_module and not self._was_reset(pl_module):
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

    def _was_reset(self, pl_module: LightningModule) -> bool:
        """Whether a layer that was equalized has weights from before again, as in another fold."""
        fusions = self.report.fusions if self.report and self.report.mode != "off" else ()
        return any(not counts_as_equalized(layer_of(pl_module, f), f) for f in fusions)

    # -- the three ways a fit can start ----------------------------------------------------

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        others = [] if self.mode == "off" else [c for c in _callbacks(trainer) if c is not self]
        copies = find_copies(pl_module, others)
        left_alone = self._is_left_alone(pl_module)
        with (
            calibration(
                trainer,
                pl_module,
                loader=self.loader,
                forward=self.forward,
                batch_to_input=self.batch_to_input,
                max_batches=self.options.max_batches,
                seed=int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed,
            ) as found,
            _progress(self._bar(trainer, found.n_batches)) as step,
        ):
            # the calibration's batches end at max_batches over all ranks
            options = replace(self.options, max_batches=None)
            if left_alone:
                options = replace(options, mode="off")
            report = equalize_as(
                pl_module, found.batches, options, found.forward, None, step, _trained(trainer)
            )
        notes = [*found.notes, *([LEFT_ALONE] if left_alone else [])]
        if report.mode != "off":
            notes += _refresh_averages(trainer, pl_module, report)
            notes += stale_copies(pl_module, report.fusions, copies, _refreshed(trainer))
        self.report = replace(report, notes=tuple(dict.fromkeys((*report.notes, *notes))))
        self._publish(trainer)

    def _is_left_alone(self, pl_module: LightningModule) -> bool:
        said = getattr(pl_module, "scale_equalized", False)
        return bool(said) and self.mode != "off" and not self.options.force

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
        assert self.report is not None
        if self.report.mode != "reparametrize" or not self.report.fusions:
            return
        averages = (copy for _, copy, _ in averaged_copies(_callbacks(trainer)))
        for network in (pl_module, *averages):
            if not reparametrized(network):
                reparametrize_(network, self.report, continued=True)

    # -- what a beginning shows --------------------------------------------------------------

    def _bar(self, trainer: Trainer, n_batches: int) -> int | None:
        return n_batches if self.verbose and trainer.is_global_zero else None

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


def _trained(trainer: Trainer) -> str:
    """How the trainer knows that the weights were trained; "" if it does not."""
    step = resumed_step(trainer)
    return f"this run goes on at step {step} of one that was not equalized" if step else ""


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


def _refresh_averages(
    trainer: Trainer, pl_module: LightningModule, report: Report
) -> Iterator[str]:
    """Weight averaging copied the model in `setup`, before it was equalized: copy again.

    Every validation before the first average would else see the weights as they were.
    """
    for name, copy, begun in averaged_copies(_callbacks(trainer)):
        if begun:
            yield f"{name} has begun to average: its average keeps the weights as they were"
            continue
        if report.mode == "reparametrize" and report.fusions:
            reparametrize_(copy, report)
        for old, new in zip(copy.parameters(), pl_module.parameters(), strict=True):
            _copy_values(old, new)


def _refreshed(trainer: Trainer) -> set[int]:
    """Where in memory the averages are that were copied again."""
    averages = averaged_copies(_callbacks(trainer))
    copied = (copy for _, copy, begun in averages if not begun)
    return {values.data_ptr() for copy in copied for values in copy.parameters()}


def _callbacks(trainer: Trainer) -> list[Any]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _copy_values(old: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        old.copy_(new)
