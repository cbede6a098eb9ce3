"""The tensors in whatever a network returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def outputs_of(result: Any) -> list[Tensor]:
    """Copies of all tensors in a result: sequences, mappings and dataclasses are searched."""
    if isinstance(result, Tensor):
        return [result.detach().clone()]
    if isinstance(result, Mapping):
        parts: Sequence[Any] = list(result.values())
    elif isinstance(result, (list, tuple)):
        parts = result
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        parts = list(vars(result).values())
    else:
        return []
    return [tensor for part in parts for tensor in outputs_of(part)]


def same_outputs(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal to the last bit; NaN equals NaN."""
    if len(first) != len(second):
        return False
    return all(_same(a, b) for a, b in zip(first, second, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    both_nan = (a != a) & (b != b)
    return bool(((a == b) | both_nan).all()) if a.numel() else True


def rounding(values: Tensor) -> float:
    """What a few operations may lose in the precision of `values`, relative to the largest."""
    unit = torch.finfo(values.dtype).eps
    return (64 if unit < 1e-6 else 4) * unit


def close_outputs(first: Sequence[Tensor], second: Sequence[Tensor], tolerance: float) -> bool:
    """Whether all tensors are equal up to rounding."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return False
        if not _same(a, b) and not torch.allclose(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * float(b.double().abs().amax())
        ):
            return False
    return True
