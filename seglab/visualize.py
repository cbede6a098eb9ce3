"""Masks as pictures: indexed PNG files, overlays, and image | label | prediction grids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seglab.palette import Color, make_palette

Pixels = NDArray[np.uint8]

_FAINT = 96  # spread in 0..255 below which a deep image is stretched to be shown
VOID_COLOR = (255, 255, 255)
"""Colour of every id that is no class, 255 = ignored among them."""
GAP = 4  # pixels between the cells of a grid


def color_table(palette: Sequence[Color] | None, num_classes: int) -> Pixels:
    """One colour for each of the 256 values that a mask pixel can have.

    Args:
        palette: RGB triples of the classes; PASCAL VOC's colours if None.
        num_classes: How many colours to make if there is no palette.

    Returns:
        uint8 (256, 3); rows beyond the classes are `VOID_COLOR`.

    >>> color_table([(10, 20, 30)], num_classes=1)[[0, 255]].tolist()
    [[10, 20, 30], [255, 255, 255]]
    """
    table = np.full((256, 3), VOID_COLOR, np.uint8)
    colors = class_colors(palette, num_classes)[:256]
    table[: len(colors)] = colors
    return table


def class_colors(palette: Sequence[Color] | None, num_classes: int) -> Pixels:
    """One colour per class, uint8 (K, 3); PASCAL VOC's, repeated beyond 256, if none are given.

    >>> class_colors(None, 300)[256 + 1].tolist()
    [128, 0, 0]
    """
    made = make_palette(256)
    colors = palette or [made[index % 256] for index in range(num_classes)]
    return np.array(colors, np.uint8).reshape(-1, 3)


def as_mask(ids: NDArray[Any]) -> Pixels:
    """Class ids of any integer type as uint8; those above 255, which do not fit, become 255."""
    mask: Pixels = np.minimum(ids, 255).astype(np.uint8)
    return mask


def save_mask(path: str | Path, mask: Pixels, colors: Pixels) -> None:
    """Write class ids as an indexed PNG: viewers show colours, readers get the ids back.

    Args:
        path: Of the file; missing folders are made.
        mask: Class ids, uint8 (H, W).
        colors: uint8 (256, 3), see `color_table`.

    Raises:
        ValueError: The mask is not a single-channel uint8 image.
    """
    from PIL import Image

    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(
            f"{path}: an indexed PNG holds uint8 (H, W), got {mask.dtype} {mask.shape}; more than"
            " 256 classes do not fit."
        )
    picture = Image.fromarray(mask)
    picture.putpalette(colors.tobytes())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def save_picture(path: str | Path, picture: Pixels) -> None:
    """Write uint8 RGB (H, W, 3); missing folders are made."""
    from PIL import Image

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def as_rgb(image: NDArray[Any]) -> Pixels:
    """Show an image of any number of bands, (H, W, C) in 0..255, as uint8 RGB (H, W, 3).

    One or two bands become grey, of more the first three are shown; what lies outside is clipped.
    Of deep images, dark ones are stretched, so that there is something to see: a sensor fills a
    small part of its range.

    >>> as_rgb(np.full((1, 1, 5), 300.0)).tolist()
    [[[255, 255, 255]]]
    >>> as_rgb(np.arange(10.0, 20.0).reshape(10, 1, 1)).max()
    np.uint8(255)
    """
    bands = image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
    if bands.dtype == np.uint8:
        return np.ascontiguousarray(bands)
    low, high = np.percentile(bands, (1, 99))
    if 0 < high - low < _FAINT:
        bands = (bands - low) * (255 / (high - low))
    shown: Pixels = bands.round().clip(0, 255).astype(np.uint8)
    return shown


def overlay(image: Pixels, mask: Pixels, colors: Pixels, opacity: float = 0.5) -> Pixels:
    """Lay the colours of a mask over its image.

    Args:
        image: uint8 (H, W, 3); brought to the mask's size if it differs.
        mask: Class ids, uint8 (h, w).
        colors: uint8 (256, 3), see `color_table`.
        opacity: Of the mask, 0..1.

    Returns:
        uint8 (h, w, 3).

    >>> image, mask = np.zeros((1, 2, 3), np.uint8), np.array([[0, 1]], np.uint8)
    >>> overlay(image, mask, color_table([(0, 0, 0), (200, 100, 0)], 2))[0, 1].tolist()
    [100, 50, 0]
    """
    image = _resize(image, mask.shape[0], mask.shape[1], smooth=True)
    mixed = (1 - opacity) * image + opacity * colors[mask]
    return np.rint(mixed).astype(np.uint8)


def grid(rows: Sequence[tuple[Pixels, Pixels, Pixels]], colors: Pixels, side: int = 256) -> Pixels:
    """Put image, label and prediction next to each other, one sample a row.

    Args:
        rows: (image uint8 (H, W, 3), label uint8 (h, w), prediction uint8 (h, w)) each.
        colors: uint8 (256, 3), see `color_table`.
        side: Longest side of a cell in pixels; smaller pictures are magnified to it.

    Returns:
        uint8 RGB; rows of other proportions are padded with white.

    >>> image, mask = np.zeros((4, 8, 3), np.uint8), np.zeros((4, 8), np.uint8)
    >>> grid([(image, mask, mask)], color_table(None, 2), side=16).shape
    (8, 56, 3)
    """
    strips = [_strip(image, (label, found), colors, side) for image, label, found in rows]
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate([_pad(strip, width) for strip in strips])[:-GAP]


def _pad(strip: Pixels, width: int) -> Pixels:
    missing = width - strip.shape[1]
    return np.pad(strip, ((0, GAP), (0, missing), (0, 0)), constant_values=255)


def _strip(image: Pixels, masks: tuple[Pixels, ...], colors: Pixels, side: int) -> Pixels:
    factor = side / max(masks[0].shape)
    height, width = (max(1, round(length * factor)) for length in masks[0].shape)
    cells = [_resize(image, height, width, smooth=True)]
    cells += [colors[_resize(mask, height, width, smooth=False)] for mask in masks]
    gap = np.full((height, GAP, 3), 255, np.uint8)
    return np.concatenate([cells[0], *(part for cell in cells[1:] for part in (gap, cell))], axis=1)


def _resize(picture: Pixels, height: int, width: int, *, smooth: bool) -> Pixels:
    from PIL import Image

    if picture.shape[:2] == (height, width):
        return picture
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), how))
