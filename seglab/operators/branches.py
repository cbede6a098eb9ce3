"""`convolve_branches`: fuse those branches that are worth it, resize the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seglab.operators.costs import choose_fused
from seglab.operators.fuse import fuse
from seglab.operators.fused_conv import Geometry


def convolve_branches(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    force: str | None = None,
) -> tuple[Tensor, tuple[bool, ...]] | None:
    """Convolve the concatenation of resized branches, at least one of them at its own resolution.

    Args:
        features: branches (B, C_i, h_i, w_i).
        weight: (O, sum of C_i, kh, kw).
        bias: (O,) or None.
        geometry: size, convolution and resampling.
        force: as for `FusionConv2d`.

    Returns:
        The result (B, O, *geometry.out_size) and which branches were fused; None if fusing any
        would be slower, or they are not alike.
    """
    branches, weight, bias = _as_autocast(features, weight, bias)
    if any(x.dtype != weight.dtype or x.ndim != 4 for x in branches):
        return None
    fused = choose_fused(branches, len(weight), geometry, force)
    if not any(fused):
        return None
    runs = _runs(fused)
    # One split, whose gradient is one concatenation.
    channels = [sum(branches[index].shape[1] for index in run) for run in runs]
    slices = torch.split(weight, channels, dim=1)
    pairs = list(zip(runs, slices, strict=True))
    maps = [branches[run[0]] for run in runs if fused[run[0]]]
    parts = [part for run, part in pairs if fused[run[0]]]
    direct = [branches[index] for run in runs for index in run if not fused[index]]
    if direct:
        resized = [geometry.resampling(x, geometry.size) for x in direct]
        maps.insert(0, _concatenate(resized))
        parts.insert(0, _concatenate([part for run, part in pairs if not fused[run[0]]]))
    return fuse(maps, parts, bias, geometry, direct=bool(direct)), fused


def _runs(fused: Sequence[bool]) -> list[list[int]]:
    """Indices of branches that share one slice of the weight: neighbours that are not fused.

    >>> _runs([False, False, True, True, False])
    [[0, 1], [2], [3], [4]]
    """
    runs: list[list[int]] = []
    for index, is_fused in enumerate(fused):
        if runs and not is_fused and not fused[index - 1]:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)


def _as_autocast(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Cast as `F.conv2d` would under autocast."""
    device = weight.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return list(features), weight, bias
    dtype = torch.get_autocast_dtype(device)
    cast = [x.to(dtype) for x in (*features, weight)]
    return cast[:-1], cast[-1], None if bias is None else bias.to(dtype)
