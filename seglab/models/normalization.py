"""Refuse to train batch normalization on a single value per channel, before torch does."""

from __future__ import annotations

import torch
from torch import nn

from seglab.torch_internals import BatchNorm


def refuse_single_value(norm: nn.Module, n_values: int, what: str) -> None:
    """Raise if `norm` is about to take its statistics from one value per channel.

    Args:
        norm: the normalization; only batch normalization in training is refused.
        n_values: values per channel that it will see on this device.
        what: what leaves a single value, for the message.

    Raises:
        ValueError: one value, and no other device to share statistics with.

    >>> refuse_single_value(nn.BatchNorm2d(3).eval(), 1, "global pooling")
    >>> refuse_single_value(nn.BatchNorm2d(3), 2, "global pooling")
    """
    if _takes_statistics(norm) and n_values == 1:
        raise ValueError(
            f"{what} leaves one value per channel in a batch of 1, and batch "
            "normalization cannot train on one value: use a batch size of at least 2 per "
            "device, or several devices with `--trainer.sync_batchnorm true`"
        )


def _takes_statistics(norm: nn.Module) -> bool:
    alone = not isinstance(norm, nn.SyncBatchNorm) or not torch.distributed.is_initialized()
    return isinstance(norm, BatchNorm) and norm.training and alone
