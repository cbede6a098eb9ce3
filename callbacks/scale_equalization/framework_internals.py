"""Every private part of torch and lightning that the edges of this package rely on, by name.

Each function says why nothing public does it; `tests/test_edges.py` holds most of them against the
installed versions. Nothing here imports lightning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.data import DataLoader


def clone_loader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """The same loader of the same class with other parts, and no iterator or workers yet.

    A constructor call cannot do it: subclasses have arguments of their own, and DataLoader forbids
    setting `dataset` and `batch_sampler` later.
    """
    clone = copy.copy(loader)
    clone.__dict__.update(changes, _iterator=None, persistent_workers=False, pin_memory=False)
    return clone


def training_source(trainer: Any) -> Any:
    """What the trainer will train on: the loader given to `fit`, or a fresh one from its method.

    `trainer.train_dataloader` is None until the loop is set up, after `on_fit_start`.
    """
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader
    return trainer.fit_loop._data_source.dataloader()


def gives_new_loaders(trainer: Any, loader: Any) -> bool:
    """Whether the trainer gets its loader from a method that does not give `loader` again."""
    source = trainer.fit_loop._data_source
    return bool(source.is_module()) and source.dataloader() is not loader


def combine_like(combined: Any, loaders: Sequence[Any]) -> Any:
    """A CombinedLoader of the class and mode of another one, over other loaders."""
    made = type(combined)(combined.iterables, combined._mode)
    made.flattened = list(loaders)
    return made


def combines_batches(source: Any) -> bool:
    """Whether a loader is a CombinedLoader that gives the batches of its members together."""
    return getattr(source, "_mode", "sequential") != "sequential" and hasattr(source, "flattened")


def averaged_copies(callbacks: Sequence[Any]) -> Iterator[tuple[str, nn.Module, bool]]:
    """Copies that weight averaging keeps: the callback's name, the copy, and whether it is begun.

    WeightAveraging and StochasticWeightAveraging copy the module in `setup`, before `on_fit_start`,
    and offer no way to copy again (Lightning's issue 21724).
    """
    for callback in callbacks:
        average: Any = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            begun = bool(getattr(average, "n_averaged", 0))
            yield type(callback).__name__, getattr(average, "module", average), begun


def resumed_step(trainer: Any) -> int:
    """The optimizer steps that a fit goes on from: of an earlier fit, or of its checkpoint.

    `trainer.global_step` is restored after `on_fit_start` only.
    """
    loaded = getattr(trainer._checkpoint_connector, "_loaded_checkpoint", None) or {}
    return max(int(trainer.global_step), int(loaded.get("global_step", 0)))


@contextmanager
def silent_logging(model: nn.Module) -> Iterator[None]:
    """Calls of `self.log` inside `forward` do nothing: outside a training step they raise."""
    names = ("log", "log_dict")
    modules = [m for m in model.modules() if hasattr(m, "log_dict") and hasattr(m, "_trainer")]
    before = [{name: m.__dict__[name] for name in names if name in m.__dict__} for m in modules]
    for module in modules:
        module.__dict__.update(dict.fromkeys(names, _ignore))
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            for name in names:
                del module.__dict__[name]
            module.__dict__.update(kept)


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take the place of `self.log`."""
