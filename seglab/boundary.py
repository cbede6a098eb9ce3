"""Boundary IoU: how well the outlines agree, where IoU only sees the insides of large objects.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021: of
each mask only the pixels within d of its outline are kept, d being 2 % of the image's diagonal, and
IoU is taken of these. The image's border is an outline too. As for IoU here, intersections and
unions are summed over the whole set before their ratio is taken.

Pixels without label are taken out of both masks before their outlines are drawn: what is predicted
there changes nothing, and the rim of an unlabelled region is an outline of both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seglab.image_scores import count_ids

DILATION_RATIO = 0.02  # of the diagonal, the paper's


def boundary_width(height: int, width: int, ratio: float = DILATION_RATIO) -> int:
    """Distance d in pixels up to which a pixel belongs to the boundary; at least 1.

    >>> boundary_width(512, 512), boundary_width(4, 4)
    (14, 1)
    """
    return max(1, round(ratio * math.hypot(height, width)))


def is_boundary(ids: Tensor, width: int) -> Tensor:
    """Whether another class, or the end of the image, lies within `width` pixels, diagonals too.

    Args:
        ids: Class ids (B, H, W), integer.
        width: d: neighbours in a square of 2 d + 1 pixels are looked at.

    Returns:
        bool (B, H, W): for each class at once, its mask without the mask's erosion.

    >>> is_boundary(torch.tensor([[[0, 0, 0], [0, 0, 0], [0, 0, 0]]]), 1).int().tolist()
    [[[1, 1, 1], [1, 0, 1], [1, 1, 1]]]
    """
    # The square holds one class if each of its rows does, and one of its columns.
    mixed_rows = _any_between(_edges(ids, 2), 1 - width, width + 1, 2)
    height = ids.shape[1]
    return _any_between(mixed_rows, -width, width + 1, 1, height) | _any_between(
        _edges(ids, 1), 1 - width, width + 1, 1
    )


def count_boundaries(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count the boundary pixels of each class in each image, without asking the device.

    Args:
        prediction: Class ids (B, H, W).
        target: Labels (B, H, W); pixels outside 0..K-1 in either count nowhere.
        num_classes: K.

    Returns:
        int64 (B, 3, K): common, labelled and predicted boundary pixels.
    """
    prediction, target = prediction.long(), target.long()
    inside = (target >= 0) & (target < num_classes) & (prediction >= 0) & (prediction < num_classes)
    width = boundary_width(target.shape[-2], target.shape[-1])
    outlines = []
    for ids in (target, prediction):
        known = torch.where(inside, ids, num_classes)
        outlines.append(torch.where(is_boundary(known, width), known, num_classes))
    labelled, predicted = outlines
    common = torch.where(labelled == predicted, labelled, num_classes)
    return torch.stack([count_ids(ids, num_classes) for ids in (common, *outlines)], dim=1)


def _edges(ids: Tensor, dim: int) -> Tensor:
    """Where a class ends along an axis of L pixels, L + 1 places: both ends are edges."""
    size = ids.shape[dim]
    ends = torch.ones_like(ids.narrow(dim, 0, 1), dtype=torch.bool)
    inner = ids.narrow(dim, 1, size - 1) != ids.narrow(dim, 0, size - 1)
    return torch.cat((ends, inner, ends), dim)


def _any_between(
    flags: Tensor, start: int, stop: int, dim: int, n_pixels: int | None = None
) -> Tensor:
    """Whether a flag is set in i + start .. i + stop - 1, for each pixel i of an axis.

    Sums from the beginning of the axis are compared: the cost does not depend on the distance.
    """
    n_flags = flags.shape[dim]
    n_pixels = n_flags - 1 if n_pixels is None else n_pixels
    sums = flags.cumsum(dim, dtype=torch.int32)
    sums = torch.cat((torch.zeros_like(sums.narrow(dim, 0, 1)), sums), dim)
    places = torch.arange(n_pixels, device=flags.device)
    first, last = ((places + offset).clamp(0, n_flags) for offset in (start, stop))
    return sums.index_select(dim, last) > sums.index_select(dim, first)
