"""timm's Swin and Twins, changed to compute what MMSegmentation's backbones of that name compute.

Parameters and their names stay timm's. What differs, and only at sizes that windows do not divide
(512 x 512 is one) or in training:

- Swin: timm shifts a map and then pads it to whole windows, MMSegmentation pads and then shifts.
- Twins: timm lets windows attend to padding, MMSegmentation masks it; timm drops odd rows and
columns
  before a patch embedding, MMSegmentation pads them; norms have another epsilon; and stochastic
  depth is applied twice to most branches there.
- ConvNeXt and ResNet need nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, window_partition, window_reverse
from timm.models.twins import Block, LocallyGroupedAttn, PatchEmbed
from torch import Tensor, nn

from seglab.models.sizes import pad_to_multiple


def follow_mmsegmentation_(model: nn.Module) -> None:
    """Give a timm Swin or Twins-SVT the arithmetic of MMSegmentation, in place; leave others alone.

    Only the classes of some sub-modules change, so parameters, names and random state do not.

    >>> import timm
    >>> model = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False)
    >>> follow_mmsegmentation_(model)
    >>> type(model.layers[0].blocks[0]).__name__
    'PadThenShiftBlock'
    """
    family = type(model).__module__
    if family == "timm.models.swin_transformer":
        _retype(model, SwinTransformerBlock, PadThenShiftBlock)
    if family == "timm.models.twins":
        _retype(model, LocallyGroupedAttn, MaskedWindowAttention)
        _retype(model, PatchEmbed, PaddedPatchEmbed)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
            elif isinstance(module, Block):
                _drop_paths_twice(module)


def run_twins(model: Any, norms: Sequence[nn.Module], image: Tensor) -> list[Tensor]:
    """Return Twins' levels; each stage continues from the *normed* map of the one before.

    In Swin and ConvNeXt the output norms stand beside the trunk, in MMSegmentation's Twins they are
    part of it (`twins.py`, `norm_after_stage`).

    Args:
        model: timm's Twins.
        norms: one for each stage, on (B, C, H, W).
        image: (B, 3, H, W).
    """
    levels = []
    x = image
    for stage, norm in enumerate(norms):
        tokens, size = model.patch_embeds[stage](x)
        tokens = model.pos_drops[stage](tokens)
        first, *others = model.blocks[stage]
        tokens = model.pos_block[stage](first(tokens, size), size)
        for block in others:
            tokens = block(tokens, size)
        x = norm(tokens.transpose(1, 2).reshape(len(tokens), -1, *size))
        levels.append(x)
    return levels


def _retype(model: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    """Swap the class of sub-modules: the one way to change a forward but no name, hook or state."""
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new


def _drop_paths_twice(block: Any) -> None:
    """Two drops at rate p in a row are one at 1 - (1 - p)^2 (`twins.py`: FFN, and GSA)."""
    paths = [block.drop_path2]
    if not isinstance(block.attn, LocallyGroupedAttn):
        paths.append(block.drop_path1)
    for path in paths:
        if hasattr(path, "drop_prob"):
            path.drop_prob = 1 - (1 - path.drop_prob) ** 2


class PadThenShiftBlock(SwinTransformerBlock):  # type: ignore[misc]  # timm has no types
    """Swin block that pads to whole windows before the cyclic shift, not after."""

    def _attn(self, x: Tensor) -> Tensor:
        """Attend in (shifted) windows over (B, H, W, C)."""
        height, width, channels = x.shape[1:]
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        padded_height, padded_width = x.shape[1:3]
        down, right = self.shift_size
        x = torch.roll(x, shifts=(-down, -right), dims=(1, 2)) if down or right else x
        mask = self.get_attn_mask(x) if self.dynamic_mask else self.attn_mask
        windows = window_partition(x, self.window_size).view(-1, self.window_area, channels)
        windows = self.attn(windows, mask=mask).view(-1, rows, columns, channels)
        x = window_reverse(windows, self.window_size, padded_height, padded_width)
        x = torch.roll(x, shifts=(down, right), dims=(1, 2)) if down or right else x
        return x[:, :height, :width].contiguous()


class MaskedWindowAttention(LocallyGroupedAttn):  # type: ignore[misc]
    """Twins' local attention in which no pixel attends to padding."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Attend in windows over tokens (B, H * W, C) of a map of `size` = (H, W)."""
        batch, n_tokens, channels = x.shape
        height, width = size
        side = self.ws
        below, right = -height % side, -width % side
        x = F.pad(x.view(batch, height, width, channels), (0, 0, 0, right, 0, below))
        windows = _cut(x, side)  # (B * n_windows, side^2, C)
        heads = (len(windows), side * side, 3, self.num_heads, channels // self.num_heads)
        query, key, value = self.qkv(windows).view(heads).permute(2, 0, 3, 1, 4)
        mask = self._mask(batch, size, x) if below and right else None
        dropout = self.attn_drop.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        attended = attended.transpose(1, 2).reshape(windows.shape)
        x = window_reverse(attended, (side, side), height + below, width + right)
        x = x[:, :height, :width].reshape(batch, n_tokens, channels)
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]

    def _mask(self, batch: int, size: tuple[int, int], padded: Tensor) -> Tensor:
        """True for keys inside the image: (B * n_windows, 1, 1, side^2).

        MMSegmentation masks only where both sides are padded; where one is, its slice `-0:` marks
        everything and nothing is masked. So here.
        """
        inside = torch.zeros((1, *padded.shape[1:3], 1), dtype=torch.bool, device=padded.device)
        inside[:, : size[0], : size[1]] = True
        return _cut(inside, self.ws).squeeze(-1)[:, None, None].repeat(batch, 1, 1, 1)


class PaddedPatchEmbed(PatchEmbed):  # type: ignore[misc]
    """Twins' patch embedding that pads odd rows and columns instead of dropping them."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed (B, C, H, W) into tokens and the size of their map."""
        return super().forward(pad_to_multiple(x, self.patch_size[0]))  # type: ignore[no-any-return]


def _cut(x: Tensor, side: int) -> Tensor:
    """Cut (B, H, W, C) into windows (B * n_windows, side * side, C)."""
    windows: Tensor = window_partition(x, (side, side))
    return windows.view(-1, side * side, x.shape[-1])
