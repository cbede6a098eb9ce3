"""ESeg-style head: a BiFPN up to stride 512, levels merged at the finest, separable convolutions.

After "Revisiting Multi-Scale Feature Fusion for Semantic Segmentation" (Meng et al. 2022, ESeg): a
richer feature space, P2 to P9, instead of atrous convolutions or a high internal resolution. The
pyramid is EfficientDet's. How levels are merged, the layers after that and all numbers of the
variants in `configs/` are ours, not from the paper, whose code is not public.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from seglab.models.heads.base import Head
from seglab.models.necks.bifpn import BiFPN
from seglab.models.necks.blocks import SeparableConv
from seglab.models.necks.weighted_sum import WeightedSum
from seglab.operators.fusion_conv import FusionBlock

Merge = Literal["bilinear", "nearest", "concat", "finest"]


class BiFPNHead(Head):
    """BiFPN, merge of all its levels at the finest, separable convolutions; logits at that size.

    Args:
        in_channels: channels of every encoder level, fine to coarse, the first of stride 4 (P2).
        num_classes: K, the number of logits.
        channels: width of the pyramid.
        repeats: number of BiFPN cells.
        levels: finest and coarsest level of the pyramid; P_i has stride 2 ** i.
        dropout: probability that a whole channel is zeroed before `conv_seg`.
        head_channels: width of the convolutions after the merge; None: as the pyramid.
        head_repeats: number of those convolutions.
        merge: "bilinear" and "nearest" resize every level to the finest and add them with learned
            weights; "concat" fuses them by a 1x1 convolution; "finest" takes that level alone.
        weighted: fast normalized fusion in the pyramid; False adds.
        activation: called for each activation.
        bias: whether convolutions have a bias before their normalization, as EfficientDet's do.

    Raises:
        ValueError: another `merge`, or what `BiFPN` refuses.

    >>> import torch
    >>> head = BiFPNHead([16, 32], num_classes=5, channels=8, repeats=1, levels=(2, 5)).eval()
    >>> head([torch.zeros(1, 16, 9, 12), torch.zeros(1, 32, 5, 6)]).shape
    torch.Size([1, 5, 9, 12])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 64,
        repeats: int = 3,
        levels: tuple[int, int] = (2, 9),
        dropout: float = 0.1,
        head_channels: int | None = None,
        head_repeats: int = 3,
        merge: Merge = "bilinear",
        weighted: bool = True,
        activation: Callable[[], nn.Module] = nn.SiLU,
        bias: bool = True,
    ) -> None:
        width = head_channels or channels
        super().__init__(in_channels, num_classes, width if head_repeats else channels, dropout)
        self.bifpn = BiFPN(
            in_channels,
            channels,
            repeats,
            levels,
            weighted=weighted,
            activation=activation,
            bias=bias,
            finest_only=merge == "finest",
        )
        self.merge = _build_merge(merge, self.bifpn.channels)
        layers: list[nn.Module] = []
        for index in range(head_repeats):
            layers += [SeparableConv(width if index else channels, width, bias), activation()]
        self.convs = nn.Sequential(*layers)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features (B, C_i, h_i, w_i), fine to coarse, to logits at the finest level's size."""
        return self.classify(self.convs(self.merge(self.bifpn(features))))


def _build_merge(merge: str, channels: Sequence[int]) -> nn.Module:
    if merge in ("bilinear", "nearest"):
        return WeightedSum(len(channels), mode=merge)
    if merge == "concat":
        return FusionBlock(channels, channels[0], kernel_size=1)
    if merge == "finest":
        return Finest()
    raise ValueError(f"merge is 'bilinear', 'nearest', 'concat' or 'finest', got {merge!r}")


class Finest(nn.Module):
    """The finest of several levels."""

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Return the first of the maps."""
        return levels[0]
