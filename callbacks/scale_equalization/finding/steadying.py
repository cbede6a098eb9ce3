"""Operations without chance, and without what PyTorch refuses for a batch of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import operations as ops
from .calls import Log


def steadied(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], log: Log
) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments without dropout, and without batch statistics of a single value."""
    if name == "batch_norm":
        return _single_values(args, kwargs, log)
    if name == "scaled_dot_product_attention":
        return ops.replaced(args, kwargs, 4, "dropout_p", 0.0)
    if name == "multi_head_attention_forward":
        return ops.replaced(args, kwargs, 10, "dropout_p", 0.0)
    return args, kwargs


def _single_values(
    args: Sequence[Any], kwargs: dict[str, Any], log: Log
) -> tuple[Sequence[Any], dict[str, Any]]:
    """One value per channel (batch 1, pooled to 1x1) is normalized over the channels instead."""
    values = ops.argument(args, kwargs, 0, "input")
    training = ops.argument(args, kwargs, 5, "training", False)
    if not training or values.dim() < 2 or values.numel() != values.shape[1]:
        return args, kwargs
    log.single_value_norms += 1
    spread, centre = torch.var_mean(values.detach().float(), correction=0)
    args, kwargs = ops.replaced(args, kwargs, 5, "training", False)
    args, kwargs = ops.replaced(args, kwargs, 1, "running_mean", centre.expand(values.shape[1]))
    return ops.replaced(args, kwargs, 2, "running_var", spread.expand(values.shape[1]))
