"""A toy pyramid whose maps are added with learned weights, as in EfficientDet's BiFPN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-4


class FastNormalized(nn.Module):
    """sum_i w_i x_i / (sum_j w_j + eps), w = relu(edge_weights), at the first map's size."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.edge_weights = nn.Parameter(torch.ones(n))

    def forward(self, *maps: Tensor) -> Tensor:
        w = self.edge_weights.relu()
        w = w / (w.sum() + EPS)
        total = w[0] * maps[0]
        for i, x in enumerate(maps[1:], start=1):
            resized = F.interpolate(x, maps[0].shape[-2:], mode="bilinear")
            total = total + w[i] * resized
        return total


class Pyramid(nn.Module):
    """Three levels far apart in scale; what `down` fuses goes on into `merge`."""

    def __init__(self, fuse: Callable[[int], nn.Module] = FastNormalized) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, 4, 3, 2**i, 1) for i in range(3))
        self.down, self.merge = fuse(2), fuse(3)
        self.mix = nn.Sequential(nn.SiLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.classify = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine, middle, coarse = (
            factor * level(x) for factor, level in zip((1.0, 5.0, 0.2), self.levels, strict=True)
        )
        mixed = self.mix(self.down(middle, coarse))
        return self.classify(self.merge(fine, mixed, coarse))
