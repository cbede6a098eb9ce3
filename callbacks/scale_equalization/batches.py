"""From a batch of anybody's project to the network's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .fusion import ScaleEqualizationError

INPUT_KEYS = ("image", "images", "pixel_values", "input", "x")


def find_input(batch: Any) -> Any:
    """The network's input in a batch.

    Args:
        batch: A tensor; a mapping with one of `INPUT_KEYS`; a sequence whose first item is one.

    Raises:
        ScaleEqualizationError: None of these.

    >>> import torch
    >>> find_input({"image": torch.zeros(1), "mask": torch.ones(1)})
    tensor([0.])
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        found = next((key for key in INPUT_KEYS if key in batch), None)
        if found is not None:
            return batch[found]
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        return find_input(batch[0])
    raise ScaleEqualizationError(
        f"no network input in a batch of type {type(batch).__name__}{_keys(batch)}: give "
        f"batch_to_input=..., or use one of the keys {', '.join(INPUT_KEYS)}"
    )


def run_network(
    module: nn.Module, batch: Any, forward: Callable[[Any, Any], Any] | None = None
) -> Any:
    """One forward pass of a network on a batch, however it is to be fed.

    Args:
        module: The network; it may have a method ``scale_equalization_input(batch)``.
        batch: As its loader gives it.
        forward: Called as ``forward(module, batch)`` instead, if given.
    """
    if forward is not None:
        return forward(module, batch)
    own: Callable[[Any], Any] = getattr(module, "scale_equalization_input", find_input)
    values = own(batch)
    try:
        return module(values)
    except NotImplementedError as error:
        raise ScaleEqualizationError(
            f"{type(module).__name__} has no forward() to watch, or one that is not implemented "
            f"({error}): define one, or give forward=lambda module, batch: ..."
        ) from error


def _keys(batch: Any) -> str:
    return f" with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else ""
