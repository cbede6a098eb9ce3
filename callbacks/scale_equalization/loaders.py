"""Calibration batches: what training is going to draw, without disturbing it.

A clone of the training loader keeps the user's class, data set, samplers, batch sampler, collate
function and workers. Its batches of indices are drawn once, from the user's own sampler, before
any sample is read. Where all ranks draw the same batches these are dealt to them, so that the
batches of all ranks together do not depend on the number of ranks; where each draws its own, as
with a DistributedSampler, each keeps them. What is drawn from changes; see `snapshots.as_before`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from .framework_internals import clone_loader, combine_like
from .fusion import ScaleEqualizationError
from .ranks import gather, together
from .snapshots import iterators_in, seeded

STREAM_BATCHES = 64  # of what has no length and may be endless, if nobody says how many
ONE_SHOT = (
    "the training data is a {kind} that can be read once only, so measuring would use up its "
    "batches: give ScaleEqualizationCallback(loader=...) batches of its own, or let "
    "train_dataloader() make a new one at every call"
)


def calibration_loader(
    source: Any,
    *,
    max_batches: int | None = None,
    epoch_batches: float = 1.0,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    in_order: bool = False,
    one_shot: bool = False,
) -> Iterable[Any]:
    """Batches as training on `source` would draw them.

    Args:
        source: A DataLoader, a CombinedLoader, or any iterable of batches.
        max_batches: At most so many batches over all ranks; None for the whole set.
        epoch_batches: The batches of an epoch that training takes: a fraction (float), or a number
            for each rank (int), as in `limit_train_batches`. Random samplers reach the others in
            later epochs, hence are not limited by it.
        rank: This process.
        world_size: Number of processes.
        seed: Of the order of batches, and of samplers that draw from the global random streams.
        in_order: The first batches of the data set in its order (as in `overfit_batches`).
        one_shot: Whether iterators that cannot be started again may be used up.

    Batches hold at least two samples unless the user's own batch sampler says otherwise, because a
    batch normalization over one pooled sample has nothing to normalize.

    Raises:
        ScaleEqualizationError: There is nothing to draw, or measuring would use up what there is.
    """
    members = list(getattr(source, "flattened", [source]))

    def draw() -> list[Any]:
        return [
            _epoch(one, epoch_batches, world_size, seed, in_order)
            if _has_indices(one)
            else _head(one, max_batches, epoch_batches, world_size, one_shot)
            for one in members
        ]

    drawn = together(draw)
    for place, one in enumerate(members):
        if _has_indices(one):
            share = _share(drawn[place], max_batches, rank, world_size)
            drawn[place] = _over(one, share, seed + rank)
    return _Combined(combine_like(source, drawn)) if hasattr(source, "flattened") else drawn[0]


def _has_indices(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def first_member(batch: Any, iterables: Any) -> Any:
    """From a batch of a CombinedLoader over `iterables`, that of the first loader."""
    while isinstance(iterables, (Mapping, list, tuple)):
        key = next(iter(iterables)) if isinstance(iterables, Mapping) else 0
        batch, iterables = batch[key], iterables[key]
    return batch


# -- map-style data sets: batches of indices ---------------------------------------------------


def _epoch(
    loader: DataLoader[Any], epoch_batches: float, world_size: int, seed: int, in_order: bool
) -> list[Any]:
    """The batches of indices of one epoch, in a random order unless `in_order`."""
    with seeded(seed):
        batches = _indices(loader, in_order)
    if not batches:
        raise ScaleEqualizationError(
            "the training set is empty, or smaller than a batch that must be full "
            f"(batch_size={loader.batch_size}, drop_last={loader.drop_last}): there is nothing to "
            "measure"
        )
    if in_order or not isinstance(loader.sampler, RandomSampler):
        whole = isinstance(epoch_batches, float)
        n = len(batches) * epoch_batches if whole else epoch_batches * world_size
        batches = batches[: max(int(n), 1)]
    if in_order:
        return batches
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(batches), generator=draws, device="cpu")
    return [batches[index] for index in order.tolist()]


def _indices(loader: DataLoader[Any], in_order: bool) -> list[Any]:
    """Batches of indices, from the user's batch sampler or else cut from those of the sampler."""
    custom: Any = loader.batch_sampler
    if custom is not None and type(custom) is not BatchSampler:
        return [list(batch) for batch in itertools.islice(custom, _length(custom))]
    data: Any = loader.dataset
    sampler: Any = SequentialSampler(data) if in_order else loader.sampler
    if custom is None:  # each index is a batch already
        return list(itertools.islice(sampler, _length(sampler)))
    width = max(int(loader.batch_size or 1), 2)
    samples = list(itertools.islice(sampler, _length(sampler, STREAM_BATCHES * width)))
    batches = [samples[start : start + width] for start in range(0, len(samples), width)]
    if len(batches) > 1 and len(batches[-1]) < (width if loader.drop_last else 2):
        batches.pop()
    return batches


def _length(value: Any, otherwise: int = STREAM_BATCHES) -> int:
    """Its length, or another for what has none and so may be endless."""
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        return otherwise


def _share(batches: list[Any], max_batches: int | None, rank: int, world_size: int) -> list[Any]:
    """This rank's batches, as many as every other rank's."""
    digests = gather(hashlib.sha256(repr(batches).encode()).hexdigest())
    if len(set(digests)) > 1:  # the user's sampler knows the ranks
        most = -(-max_batches // world_size) if max_batches else None
        return batches[: min(gather(len(batches)))][:most]
    batches = batches[: max_batches or None]
    even = len(batches) - len(batches) % world_size
    return batches[:even][rank::world_size] or [batches[rank % len(batches)]]


def _over(loader: DataLoader[Any], batches: list[Any], seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    if loader.batch_sampler is None:
        return clone_loader(loader, sampler=batches, generator=generator)
    return clone_loader(loader, batch_sampler=batches, generator=generator)


# -- streams -------------------------------------------------------------------------------------


def _head(
    stream: Any, max_batches: int | None, epoch_batches: float, world_size: int, one_shot: bool
) -> Iterable[Any]:
    if not one_shot:
        _require_restart(stream)
    if isinstance(stream, DataLoader):
        stream = clone_loader(stream, generator=torch.Generator().manual_seed(0))
    n = -(-(max_batches or STREAM_BATCHES * world_size) // world_size)
    if not isinstance(epoch_batches, float):
        n = min(n, max(epoch_batches, 1))
    return _Head(stream, n)


def _require_restart(stream: Any) -> None:
    """Raise if reading takes something away from training; workers read copies."""
    if hasattr(type(stream), "__next__"):
        raise ScaleEqualizationError(ONE_SHOT.format(kind=type(stream).__name__))
    if getattr(stream, "num_workers", 0):
        return
    held = iterators_in(getattr(stream, "dataset", stream))
    if held:
        raise ScaleEqualizationError(ONE_SHOT.format(kind=f"stream over a {' and a '.join(held)}"))


class _Head:
    """The first n items of an iterable, again and again."""

    def __init__(self, stream: Iterable[Any], n: int) -> None:
        self.stream, self.n = stream, n

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.stream), self.n)

    def __len__(self) -> int:
        return min(self.n, _length(self.stream, self.n))


class _Combined:
    """The batches of a CombinedLoader without their indices."""

    def __init__(self, combined: Any) -> None:
        self.combined = combined

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _, _ in self.combined)
