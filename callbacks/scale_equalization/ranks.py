"""What the processes of one run have to agree on before anything is changed.

Without torch.distributed everything here is about the one process there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn

from .fusion import Fusion, ScaleEqualizationError


def world_size() -> int:
    """Number of processes."""
    active = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if active else 1


def gather_values(value: Any) -> list[Any]:
    """The plain value of every rank, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every rank what one rank raised inside, so that none waits for it for ever.

    There must be no exchange between ranks inside.
    """
    try:
        yield
    except Exception as error:
        gather_values(f"{type(error).__name__}: {error}")
        raise
    failures = {rank: text for rank, text in enumerate(gather_values(None)) if text}
    if failures:
        raise ScaleEqualizationError(
            "; ".join(f"rank {rank} failed with {text}" for rank, text in failures.items())
        )


def require_batch_everywhere(found: bool) -> None:
    """Raise on every rank if one of them has no batch: there it would wait for the others."""
    empty = [rank for rank, one in enumerate(gather_values(found)) if not one]
    if empty and world_size() == 1:
        raise ScaleEqualizationError("no batch to calibrate on: the batches are empty")
    if empty:
        raise ScaleEqualizationError(
            f"rank{'s' * (len(empty) > 1)} {', '.join(map(str, empty))} of {world_size()} without "
            "a batch to calibrate on: give every rank at least one batch of its own"
        )


def require_same_plan(model: nn.Module, fusions: Sequence[Fusion]) -> None:
    """Raise on every rank unless all of them are about to change the same weights alike.

    Raises:
        ScaleEqualizationError: Ranks found different fusions, or hold different weights.
    """
    plans = gather_values(tuple(fusions))
    if any(plan != plans[0] for plan in plans):
        raise ScaleEqualizationError(_differences(plans))
    weights = [model.get_submodule(f.name).get_parameter(f.parameter) for f in fusions]
    sums = gather_values([float(weight.detach().double().sum()) for weight in weights])
    for index, fusion in enumerate(fusions):
        if any(row[index] != sums[0][index] for row in sums):
            raise ScaleEqualizationError(
                f"the ranks hold different weights of {fusion.name}: seed all ranks alike, or "
                "wrap the model in DistributedDataParallel first, which copies rank 0's"
            )


def _differences(plans: Sequence[Sequence[Fusion]]) -> str:
    lines = ["the ranks found different fusions on their first batches:"]
    common = set(plans[0]).intersection(*plans[1:])
    for rank, plan in enumerate(plans):
        own = [
            f"{fusion.name} of {'+'.join(str(b.width) for b in fusion.branches)} channels"
            for fusion in plan
            if fusion not in common
        ]
        lines.append(f"  rank {rank} alone: {', '.join(own) or 'nothing'}")
    lines.append(
        "Let every rank's first batch take the same way through the network, give the fusions by "
        "fusions=find_fusions(...), or leave the layers out by exclude."
    )
    return "\n".join(lines)
