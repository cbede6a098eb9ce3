"""Adaptive average pooling that can be exported with a free size.

Exporters fix the size of what is pooled to a grid. Written as two matrix products, whose matrices
follow from the size when the file runs, it needs no fixed size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seglab.torch_internals import children_of


class FreeAdaptiveAvgPool2d(nn.Module):
    """As `nn.AdaptiveAvgPool2d`: cell i of n averages rows floor(i h / n) to ceil((i + 1) h / n).

    >>> x = torch.rand(1, 2, 7, 10, dtype=torch.float64)
    >>> torch.allclose(FreeAdaptiveAvgPool2d((3, 6))(x), nn.AdaptiveAvgPool2d((3, 6))(x))
    True
    """

    def __init__(self, size: tuple[int | None, int | None]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, C, H, W) or (C, H, W)."""
        rows, columns = self.size
        if rows is not None:
            x = _means(x.shape[-2], rows, x) @ x
        if columns is not None:
            x = x @ _means(x.shape[-1], columns, x).t()
        return x


def _means(length: int, n_cells: int, like: Tensor) -> Tensor:
    """Matrix (n_cells, length) of weights that add up to one per cell."""
    cells = torch.arange(n_cells, device=like.device)[:, None]
    places = torch.arange(length, device=like.device)[None]
    first = torch.div(cells * length, n_cells, rounding_mode="floor")
    last = torch.div((cells + 1) * length + n_cells - 1, n_cells, rounding_mode="floor")
    inside = ((places >= first) & (places < last)).to(like.dtype)
    return inside / inside.sum(dim=1, keepdim=True)


def free_grids_(network: nn.Module) -> nn.Module:
    """Replace adaptive average poolings to grids of more than one cell, in place."""
    for parent in list(network.modules()):
        for name, child in children_of(parent).items():
            if type(child) is nn.AdaptiveAvgPool2d:
                size: Any = child.output_size
                rows, columns = (size, size) if isinstance(size, int) else (size[0], size[1])
                if (rows, columns) != (1, 1):
                    pool = FreeAdaptiveAvgPool2d((rows, columns))
                    children_of(parent)[name] = pool.train(child.training)
    return network
