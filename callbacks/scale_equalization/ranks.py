"""What the ranks of torch.distributed agree on: one plan, one table of moments, one error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from .fusion import ScaleEqualizationError

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    active = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if active else 1


def gather(value: T) -> list[T]:
    """The values of all ranks, in order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def together(action: Callable[[], T]) -> T:
    """Run something on every rank; if it fails on one, it is an error on all."""
    if world_size() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as caught:  # whatever it is, the other ranks must not wait for this one
        error = caught
    texts = gather("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = next((rank for rank, text in enumerate(texts) if text), None)
    if failed is not None:
        raise ScaleEqualizationError(f"rank {failed} failed: {texts[failed]}")
    return result  # type: ignore[return-value]


def gather_tables(table: Tensor, ended: bool) -> tuple[Tensor, bool]:
    """All ranks' tables, interleaved by batch, and whether every rank has run out of batches."""
    world = world_size()
    if world == 1:
        return table, ended
    facts = [torch.zeros(2, dtype=torch.int64, device=table.device) for _ in range(world)]
    distributed.all_gather(facts, torch.tensor([len(table), ended], device=table.device))
    longest = max(int(fact[0]) for fact in facts)
    padded = table.new_zeros(longest, *table.shape[1:])
    padded[: len(table)] = table
    tables = [torch.empty_like(padded) for _ in range(world)]
    distributed.all_gather(tables, padded)
    joined = torch.stack(tables, dim=1).flatten(0, 1)
    return joined[joined[..., 0].sum(dim=1) > 0], all(bool(fact[1]) for fact in facts)
