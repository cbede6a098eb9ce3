"""Weighted sums of maps of different size: EfficientDet's fast normalized fusion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from seglab.operators.resampling import Resampling


class WeightedSum(nn.Module):
    """sum_i w_i x_i / (sum_i w_i + eps) with w = relu(edge_weights) (Tan et al. 2020, section 3.3).

    Only ratios of edge weights matter (up to eps), so input i can be divided by a scale s_i by
    dividing `edge_weights[i]` by s_i. An edge whose weight is negative is cut off, gradient
    included. Weights are applied before resizing, which is the same by linearity: nothing full-size
    is then kept for the backward pass.

    Args:
        n_inputs: number of maps that are added.
        mode: how maps of another size are resized, "bilinear" or "nearest".
        learned: False adds the maps as they are; `edge_weights` is then None.
        eps: keeps the quotient finite.

    >>> fuse = WeightedSum(2)
    >>> fine, coarse = torch.ones(1, 3, 4, 4), torch.ones(1, 3, 2, 2)
    >>> print(f"{fuse([fine, coarse]).mean().item():.6f}")  # 2 / (2 + eps)
    0.999950
    """

    edge_weights: nn.Parameter | None

    def __init__(
        self, n_inputs: int, mode: str = "bilinear", learned: bool = True, eps: float = 1e-4
    ) -> None:
        super().__init__()
        self.n_inputs = n_inputs
        self.resampling = Resampling(mode)
        self.eps = eps
        weights = nn.Parameter(torch.ones(n_inputs)) if learned else None
        self.register_parameter("edge_weights", weights)

    def normalized_weights(self) -> Tensor | None:
        """Return what each input is multiplied by, (n_inputs,); None if they are merely added."""
        if self.edge_weights is None:
            return None
        weights = self.edge_weights.relu()
        return weights / (weights.sum() + self.eps)

    def forward(self, inputs: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Add maps (B, C, h_i, w_i) at `size` (default: the first one's).

        Raises:
            ValueError: another number of maps than it was built for.
        """
        if len(inputs) != self.n_inputs:
            raise ValueError(f"WeightedSum adds {self.n_inputs} maps, got {len(inputs)}")
        height, width = size or inputs[0].shape[-2:]
        weights = self.normalized_weights()
        summands = (
            inputs
            if weights is None
            else [w * x for w, x in zip(weights.unbind(), inputs, strict=True)]
        )
        return reduce(add, [self.resampling(x, (height, width)) for x in summands])
