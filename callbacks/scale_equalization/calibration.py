"""What a fit is going to train on, and how, for measuring before it; all as it was afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .batches import run_network
from .framework_internals import combines_batches, gives_new_loaders, training_source
from .loaders import calibration_loader, first_member
from .snapshots import as_before, same_random_streams
from .state import norms_in_eval

NOT_SET_BACK = (
    "the data set or its transforms hold a state that could not be set back (the same first batch, "
    "drawn twice, differs), so training draws other samples than without this callback: give "
    "loader= over a data set of its own"
)

Run = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Calibration:
    """What to measure.

    Attributes:
        batches: Batches on the device, again and again.
        n_batches: How many, 0 if that is not known.
        forward: Runs the network on one of them: ``forward(module, batch)``.
        notes: What the reader of the report should know, one sentence each; complete on
            leaving.
    """

    batches: Iterable[Any]
    n_batches: int
    forward: Run
    notes: list[str]


@contextmanager
def calibration(
    trainer: Trainer,
    pl_module: LightningModule,
    *,
    loader: Iterable[Any] | None,
    forward: Run | None,
    batch_to_input: Callable[[Any], Any] | None,
    max_batches: int | None,
    seed: int,
) -> Iterator[Calibration]:
    """The batches of a fit that is about to start; afterwards everything is as before.

    Args:
        trainer: Set up, about to train.
        pl_module: What it trains.
        loader: Batches to take instead of those of the training loader.
        forward: The user's way from a batch through the network.
        batch_to_input: The user's way from a batch to the network's input.
        max_batches: At most so many over all ranks.
        seed: Of the order of batches.
    """
    with same_random_streams(), _as_training_starts(pl_module):
        source, one_shot = _source(trainer, pl_module, loader)
        own = {id(module) for module in pl_module.modules()}
        quick = bool(getattr(trainer, "fast_dev_run", False))
        trains = loader is None

        def batches_of(source: Any) -> Iterable[Any]:
            return calibration_loader(
                source,
                max_batches=1 if quick else max_batches,
                epoch_batches=getattr(trainer, "limit_train_batches", 1.0) if trains else 1.0,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                seed=seed,
                in_order=trains and bool(getattr(trainer, "overfit_batches", 0.0)),
                one_shot=one_shot,
            )

        drawn: list[Any] = []
        if not one_shot and not _has_workers(source):
            with same_random_streams(), as_before(source, but=own):
                drawn += itertools.islice(batches_of(source), 1)
        with as_before(source, but=own), trainer.precision_plugin.forward_context():
            batches = batches_of(source)
            n = len(batches) if isinstance(batches, Sized) else 0
            run, notes = _forward_for(pl_module, source, forward, batch_to_input)
            said = [*_modes(pl_module), *notes]
            found: SimpleQueue[str] = SimpleQueue()  # a list would be set back with all else
            yield Calibration(_Moved(trainer, batches, drawn, found), n, run, said)
            said += [found.get() for _ in range(found.qsize())]


def _has_workers(source: Any) -> bool:
    """Whether samples are drawn in other processes, whose state is never the data set's here."""
    return any(getattr(s, "num_workers", 0) for s in (source, *getattr(source, "flattened", ())))


@contextmanager
def _as_training_starts(pl_module: LightningModule) -> Iterator[None]:
    """A module in eval mode stays so in Lightning, which never calls `train()`: measure it so."""
    flag = pl_module.training
    pl_module.training = True
    try:
        yield
    finally:
        pl_module.training = flag


def _source(trainer: Trainer, pl_module: LightningModule, loader: Any) -> tuple[Any, bool]:
    """The loader, combination of loaders or iterable to read, and whether it may be used up."""
    if loader is not None:
        return (CombinedLoader(loader) if isinstance(loader, Mapping) else loader), True
    with as_before(pl_module, getattr(trainer, "datamodule", None)):
        source = training_source(trainer)
        one_shot = hasattr(type(source), "__next__") and gives_new_loaders(trainer, source)
    if isinstance(source, (Mapping, list, tuple)):  # as the trainer is going to combine them
        source = CombinedLoader(source, "max_size_cycle")
    return source, one_shot


def _modes(pl_module: LightningModule) -> Iterator[str]:
    kept = norms_in_eval(pl_module)
    if kept:
        yield (
            f"{len(kept)} normalization layers in eval mode ({kept[0]}, ...) were measured in eval "
            "mode, as training is going to run them"
        )


def _forward_for(
    pl_module: LightningModule,
    source: Any,
    forward: Run | None,
    to_input: Callable[[Any], Any] | None,
) -> tuple[Run, tuple[str, ...]]:
    """How a batch is run through the network, and what the reader should know about it."""
    if forward is not None:
        return forward, ()
    if to_input is not None:
        return (lambda module, batch: module(to_input(batch))), ()
    if hasattr(pl_module, "scale_equalization_input") or not combines_batches(source):
        return run_network, ()
    tree = source.iterables
    notes: tuple[str, ...] = ()
    if len(source.flattened) > 1:
        notes = (
            f"of {len(source.flattened)} training loaders the batches of the first were measured: "
            "give forward=lambda module, batch: ... to run the network on all",
        )
    return (lambda module, batch: run_network(module, first_member(batch, tree))), notes


def _same_batch(first: Any, second: Any) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=False)
    tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in tensors)


class _Moved:
    """Batches on the device, through the module's own transfer hooks, again and again.

    The first is compared with what was drawn for that before, in `drawn`: everything was set back
    in between, so if they differ, not everything was.
    """

    def __init__(
        self, trainer: Trainer, batches: Iterable[Any], drawn: list[Any], notes: SimpleQueue[str]
    ) -> None:
        self.trainer, self.batches, self.drawn, self.notes = trainer, batches, drawn, notes

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.drawn and not _same_batch(self.drawn.pop(), batch):
                self.notes.put(NOT_SET_BACK)
            yield self.trainer.strategy.batch_to_device(
                self.trainer.precision_plugin.convert_input(batch), dataloader_idx=0
            )
