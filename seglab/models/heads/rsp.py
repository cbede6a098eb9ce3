"""RSP-style head (reconstructed): context from the next coarser level by pixel-to-region attention.

After "Multi-Scale Feature Aggregation by Cross-Scale Pixel-to-Region Relation Operation for
Semantic Segmentation" (Bai et al. 2021). Its code is not public: windows, heads, widths, how
position enters and how context is fused are ours, in the manner of local relation networks (Hu et
al. 2019), not from the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seglab.models.heads.base import Head
from seglab.models.heads.blocks import ConvBlock
from seglab.models.necks import FPN, Neck
from seglab.operators.fusion_conv import FusionBlock, resize

Relation = Literal["attention", "uniform", "bilinear"]


class RelationalSemanticsExtractor(nn.Module):
    """For each fine pixel, context from a window of the coarse map, weighted by attention.

    Pixel (i, j) asks the `window` x `window` coarse pixels around (i // 2, j // 2); those outside
    the map do not take part. Logits are scaled dot products of `query` and `key` plus `position`, a
    table of the exact offset between the two pixels' centres: along each axis it is d - 1/4 for odd
    and d + 1/4 for even i, d = -(window // 2) .. window // 2, so 2 * window values, ascending.

    Everything happens at the coarse resolution, where the four fine pixels of a coarse one are
    channels, and nothing is unfolded: what is kept for the backward pass is of order
    H * W * (window ** 2 * attention_heads + channels).

    Args:
        channels: of both maps and of the context.
        key_channels: of queries and keys, all heads together.
        window: side of the window, odd.
        attention_heads: number of heads.
        relation: "attention"; for ablation "uniform", the mean of the window, or "bilinear", the
            upsampled values. Without attention there is no query, key or position.
        use_position: False leaves out `position` (ablation).

    Raises:
        ValueError: an even window, channels that the heads do not divide, or another `relation`.

    >>> extract = RelationalSemanticsExtractor(16, key_channels=8, window=3, attention_heads=2)
    >>> extract(torch.zeros(2, 16, 9, 12), torch.zeros(2, 16, 5, 6)).shape
    torch.Size([2, 16, 9, 12])
    """

    def __init__(
        self,
        channels: int,
        key_channels: int = 64,
        window: int = 3,
        attention_heads: int = 8,
        relation: Relation = "attention",
        use_position: bool = True,
    ) -> None:
        super().__init__()
        _check(channels, key_channels, window, attention_heads, relation)
        self.window = window
        self.attention_heads = attention_heads
        self.relation = relation
        self.value = nn.Conv2d(channels, channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)
        self.register_parameter("position", None)
        if relation == "attention":
            self.query = nn.Conv2d(channels, key_channels, 1)
            self.key = nn.Conv2d(channels, key_channels, 1)
            if use_position:
                table = torch.zeros(attention_heads, 2 * window, 2 * window)
                self.position = nn.Parameter(table)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Map fine (B, C, H, W) and coarse (B, C, ceil(H / 2), ceil(W / 2)) to (B, C, H, W).

        An encoder that halves odd sizes by rounding down leaves `coarse` a row or column short: its
        last one is repeated.

        Raises:
            ValueError: `coarse` has another size.
        """
        coarse = _cover(coarse, fine)
        height, width = fine.shape[-2:]
        values = self.value(coarse)
        if self.relation == "attention":
            context = self._attend(self.attention(fine, coarse), values)[..., :height, :width]
        elif self.relation == "uniform":
            means = F.avg_pool2d(values, self.window, 1, self.window // 2, count_include_pad=False)
            context = F.interpolate(means, scale_factor=2.0, mode="nearest")
            context = context[..., :height, :width]
        else:
            context = resize(values, (height, width))
        result: Tensor = self.output(context)
        return result

    def attention(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Return the weights, (B, heads, window ** 2, 4, h, w), which sum to 1 along `dim=2`.

        (h, w) is the size of `coarse`; the four are the pixels (2i, 2j), (2i, 2j + 1), (2i + 1, 2j)
        and (2i + 1, 2j + 1) of the fine map. Computed in float32 at least.
        """
        query, key = self.query(fine), self.key(coarse)
        bottom, right = fine.shape[-2] % 2, fine.shape[-1] % 2
        query = F.pixel_unshuffle(F.pad(query, (0, right, 0, bottom)), 2)
        batch, _, h, w = query.shape
        n_channels = key.shape[1] // self.attention_heads
        query = query.view(batch, self.attention_heads, n_channels, 4, h, w) * n_channels**-0.5
        precise = torch.promote_types(query.dtype, torch.float32)
        logits = torch.stack(
            [(query * k).sum(2, dtype=precise) for k in self._neighbours(key)], dim=2
        )
        if self.position is not None:
            logits = logits + self._position_of_pixels()
        outside = ~_inside(h, w, self.window, logits.device)
        return logits.masked_fill(outside, float("-inf")).softmax(2)

    def _attend(self, attention: Tensor, values: Tensor) -> Tensor:
        """Sum the values of each window, (B, C, 2h, 2w)."""
        weights = attention.to(values.dtype).unsqueeze(2).unbind(3)  # each (B, heads, 1, 4, h, w)
        neighbours = self._neighbours(values)
        context = weights[0] * neighbours[0]
        for weight, value in zip(weights[1:], neighbours[1:], strict=True):
            context = torch.addcmul(context, weight, value)
        # (B, heads, C / heads, 4, h, w) -> (B, 4 C, h, w) -> (B, C, 2h, 2w)
        return F.pixel_shuffle(context.flatten(1, 3), 2)

    def _neighbours(self, x: Tensor) -> list[Tensor]:
        """Views of (B, C, h, w), shifted to each place of the window, row by row.

        Each is (B, heads, C / heads, 1, h, w), zero outside the map.
        """
        radius = self.window // 2
        height, width = x.shape[-2:]
        padded = F.pad(x, (radius,) * 4)
        padded = padded.view(x.shape[0], self.attention_heads, -1, 1, *padded.shape[-2:])
        return [
            padded[..., row : row + height, column : column + width]
            for row in range(self.window)
            for column in range(self.window)
        ]

    def _position_of_pixels(self) -> Tensor:
        """The table as (1, heads, window ** 2, 4, 1, 1)."""
        assert self.position is not None
        k, heads = self.window, self.attention_heads
        # Of two entries with one d the first, d - 1/4, is that of odd pixels.
        table = self.position.view(heads, k, 2, k, 2).flip(2, 4)
        return table.permute(0, 1, 3, 2, 4).reshape(1, heads, k * k, 4, 1, 1)


def _inside(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Whether each place of each pixel's window lies on the map, (window ** 2, 1, h, w)."""
    shifts = torch.arange(window, device=device)[:, None] - window // 2
    rows = torch.arange(height, device=device) + shifts
    columns = torch.arange(width, device=device) + shifts
    rows_inside = ((rows >= 0) & (rows < height)).view(window, 1, 1, height, 1)
    columns_inside = ((columns >= 0) & (columns < width)).view(1, window, 1, 1, width)
    return (rows_inside & columns_inside).flatten(0, 1)


def _cover(coarse: Tensor, fine: Tensor) -> Tensor:
    """Repeat the last row or column of `coarse` where half of `fine` was rounded down."""
    pairs = list(zip(fine.shape[-2:], coarse.shape[-2:], strict=True))
    if not all(m in (n // 2, (n + 1) // 2) for n, m in pairs):
        raise ValueError(
            f"the coarse map must have half the size of the fine one, {tuple(fine.shape[-2:])}, "
            f"got {tuple(coarse.shape[-2:])}: use an encoder with output_stride 32"
        )
    below, right = ((n + 1) // 2 - m for n, m in pairs)
    return F.pad(coarse, (0, right, 0, below), mode="replicate") if below or right else coarse


def _check(channels: int, key_channels: int, window: int, heads: int, relation: str) -> None:
    if relation not in ("attention", "uniform", "bilinear"):
        raise ValueError(f"relation is 'attention', 'uniform' or 'bilinear', got {relation!r}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"the window must have an odd side, got {window}")
    if channels % heads or key_channels % heads:
        raise ValueError(
            f"attention_heads={heads} must divide channels={channels} and "
            f"key_channels={key_channels}"
        )


class RelationalSemanticsPropagator(nn.Module):
    """Fuse a fine map with the context that it extracts from the next coarser one.

    One fusion point, `fuse`: the raw lateral beside an average of normalized features.

    Args:
        extractor: context from (fine, coarse).
        channels: of both maps and of the result.
        fusion: "concat", or "sum" to add the two.
        kernel_size: of the convolution that fuses.
    """

    def __init__(
        self,
        extractor: RelationalSemanticsExtractor,
        channels: int,
        fusion: Literal["concat", "sum"] = "concat",
        kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if fusion not in ("concat", "sum"):
            raise ValueError(f"fusion is 'concat' or 'sum', got {fusion!r}")
        self.extractor = extractor
        self.adds = fusion == "sum"
        self.fuse: nn.Module = (
            ConvBlock(channels, channels, kernel_size)
            if self.adds
            else FusionBlock([channels, channels], channels, kernel_size)
        )

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Map (B, C, H, W) and (B, C, ceil(H / 2), ceil(W / 2)) to (B, C, H, W)."""
        context = self.extractor(fine, coarse)
        fused: Tensor = self.fuse(fine + context if self.adds else [fine, context])
        return fused


class RSPHead(Head):
    """Feature pyramid, then context passed down it, level by level; logits at the finest size.

    Args:
        in_channels: channels of every encoder level, fine to coarse.
        num_classes: K, the number of logits.
        channels: width of the pyramid and of everything after it.
        key_channels: of queries and keys, all heads together.
        window: side of the window of coarse pixels that a fine pixel asks.
        attention_heads: number of heads of attention.
        dropout: probability that a whole channel is zeroed before `conv_seg`.
        pyramid: called with (in_channels, channels): `FPN`, or `BiFPN` with levels of its own.
        relation: "attention"; "uniform" or "bilinear" for ablation.
        use_position: False leaves out the table of positions (ablation).
        fusion: "concat", or "sum" to add context to the level.
        kernel_size: of the convolutions that fuse.

    Raises:
        ValueError: what `RelationalSemanticsExtractor` refuses, or another `fusion`.

    >>> head = RSPHead([16, 32], num_classes=5, channels=8, key_channels=8)
    >>> head([torch.zeros(2, 16, 9, 12), torch.zeros(2, 32, 5, 6)]).shape
    torch.Size([2, 5, 9, 12])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 128,
        key_channels: int = 64,
        window: int = 3,
        attention_heads: int = 8,
        dropout: float = 0.1,
        pyramid: Callable[[Sequence[int], int], Neck] = FPN,
        relation: Relation = "attention",
        use_position: bool = True,
        fusion: Literal["concat", "sum"] = "concat",
        kernel_size: int = 3,
    ) -> None:
        super().__init__(in_channels, num_classes, channels, dropout)
        self.pyramid = pyramid(self.in_channels, channels)
        self.top = ConvBlock(channels, channels, 3)

        def propagator() -> RelationalSemanticsPropagator:
            extractor = RelationalSemanticsExtractor(
                channels, key_channels, window, attention_heads, relation, use_position
            )
            return RelationalSemanticsPropagator(extractor, channels, fusion, kernel_size)

        self.propagators = nn.ModuleList(propagator() for _ in self.pyramid.channels[1:])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features (B, C_i, h_i, w_i), fine to coarse, to logits (B, K, h_0, w_0)."""
        *finer, coarsest = self.pyramid(features)
        context = self.top(coarsest)
        for fine, propagate in zip(finer[::-1], reversed(self.propagators), strict=True):
            context = propagate(fine, context)
        return self.classify(context)
