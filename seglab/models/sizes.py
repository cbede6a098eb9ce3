"""Which image sides a timm backbone can take, and how others are brought to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# Families that merge maps of neighbouring strides and so want whole steps of the coarsest.
WHOLE_STEPS = ("timm.models.hrnet", "timm.models.dla", "timm.models.tresnet")
# Families whose attention windows must tile every level: their side at the size of pretraining.
WHOLE_WINDOWS = ("timm.models.maxxvit", "timm.models.gcvit")


def side_multiple(model: Any, coarsest_stride: int) -> int:
    """Return what both sides of an image must be multiples of.

    >>> import timm
    >>> side_multiple(timm.create_model("hrnet_w18_small"), 32)
    32
    """
    family = type(model).__module__
    if family in WHOLE_STEPS:
        return coarsest_stride
    if family in WHOLE_WINDOWS:
        return int(model.pretrained_cfg["input_size"][-1])
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    return int(patch if isinstance(patch, int) else max(patch))


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) with zeros, right and below, until both sides are multiples.

    >>> import torch
    >>> pad_to_multiple(torch.zeros(1, 3, 5, 8), 4).shape
    torch.Size([1, 3, 8, 8])
    """
    height, width = image.shape[-2:]
    right, below = -width % multiple, -height % multiple
    return F.pad(image, (0, right, 0, below)) if right or below else image


def crop_padding(levels: Sequence[Tensor], strides: Sequence[int], image: Tensor) -> list[Tensor]:
    """Cut every level to the part that shows `image`, whose padded form it was computed from.

    >>> import torch
    >>> level = torch.zeros(1, 8, 8, 8)
    >>> crop_padding([level], [4], torch.zeros(1, 3, 17, 32))[0].shape
    torch.Size([1, 8, 5, 8])
    """
    height, width = image.shape[-2:]
    return [
        level[..., : -(-height // stride), : -(-width // stride)]
        for level, stride in zip(levels, strides, strict=True)
    ]
