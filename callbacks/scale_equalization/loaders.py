"""Calibration batches from a training loader, without disturbing it.

Iterating the loader itself would eat batches, advance its workers and change the shuffling, so a
second loader is built over the same data set. The samples are cut into batches before they are
dealt to the ranks: the batches of all ranks together do not depend on the number of ranks.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .fusion import ScaleEqualizationError

STREAM_BATCHES = 64  # of an iterable data set, which may be endless, if nobody says how many


def calibration_loader(
    source: Any,
    *,
    max_batches: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    shuffle: bool = True,
) -> Iterable[Any]:
    """Batches as `source` gives them, from a loader of its own.

    Args:
        source: A DataLoader; or a collection of them (the first counts); or any iterable.
        max_batches: At most so many batches over all ranks; None for the whole set.
        rank: This process.
        world_size: Number of processes.
        seed: Of the order of samples.
        shuffle: Take the samples at random, else in order.

    Batches hold at least two samples, because a batch normalization over one pooled sample has
    nothing to normalize.
    """
    loader = first_loader(source)
    if not isinstance(loader, DataLoader):
        return _head(loader, max_batches, world_size)
    if isinstance(loader.dataset, IterableDataset):
        fresh = _twin(loader, batch_size=loader.batch_size, drop_last=loader.drop_last)
        return _head(fresh, max_batches, world_size)
    deals = _deals(loader, max_batches, seed, shuffle, world_size)
    return _twin(loader, batch_sampler=deals[rank::world_size])


def first_loader(source: Any) -> Any:
    """The first loader of a CombinedLoader, mapping or sequence of loaders; else `source`."""
    if isinstance(source, DataLoader) or source is None:
        return source
    inner = getattr(source, "iterables", source)
    if isinstance(inner, Mapping):
        inner = list(inner.values())
    if isinstance(inner, Sequence) and inner and not isinstance(inner[0], (Tensor, str)):
        candidates = [item for item in inner if isinstance(item, DataLoader)]
        return first_loader(candidates[0]) if candidates else source
    return source


def _head(stream: Iterable[Any], max_batches: int | None, world_size: int) -> Iterable[Any]:
    n = -(-(max_batches or STREAM_BATCHES) // world_size)
    return _Head(stream, n)


class _Head:
    """The first n items of an iterable, again and again."""

    def __init__(self, stream: Iterable[Any], n: int) -> None:
        self.stream, self.n = stream, n

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.stream), self.n)

    def __len__(self) -> int:
        return self.n


def _deals(
    loader: DataLoader[Any], max_batches: int | None, seed: int, shuffle: bool, world_size: int
) -> list[list[int]]:
    """Sample indices of every batch of every rank, as many batches for each."""
    size = len(loader.dataset)  # type: ignore[arg-type]
    if not size:
        raise ScaleEqualizationError("the training set is empty: there is nothing to measure")
    wanted = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    width = min(max(int(wanted), 2), size)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator).tolist() if shuffle else list(range(size))
    deals = [order[start : start + width] for start in range(0, size - width + 1, width)]
    deals = deals[: max_batches or None]
    even = len(deals) - len(deals) % world_size
    return deals[:even] or [deals[i % len(deals)] for i in range(world_size)]


def _twin(loader: DataLoader[Any], **how: Any) -> DataLoader[Any]:
    """A loader over the same samples with workers and random streams of its own."""
    dataset = loader.dataset if loader.num_workers else _own_state(loader.dataset)
    return DataLoader(
        dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(0),
        **how,
    )


def _own_state(dataset: Any) -> Any:
    """A copy of a data set that runs in this process, so that its own random streams stay put.

    The data itself (tensors, arrays, lists) is shared. What cannot be copied is used as it is.
    """
    shared: dict[int, Any] = {}
    layers = [dataset]
    for _ in range(4):  # Subset of ConcatDataset of ...: the nesting seen in practice
        values = [v for layer in layers for v in getattr(layer, "__dict__", {}).values()]
        shared.update({id(v): v for v in values if _is_data(v)})
        layers = [v for v in values if hasattr(v, "__getitem__") and hasattr(v, "__dict__")]
    try:
        return copy.deepcopy(dataset, shared)
    except Exception:  # locks, open files, generators: any class may refuse in its own way
        return dataset


def _is_data(value: Any) -> bool:
    plain = (Tensor, str, bytes, list, tuple, dict)
    return isinstance(value, plain) or type(value).__name__ in ("ndarray", "memmap")
