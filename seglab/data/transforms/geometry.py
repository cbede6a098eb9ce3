"""Random resize, crop and padding with MMSegmentation's semantics, as albumentations transforms.

albumentations has no keep-ratio resize into a scaled box, no crop that bounds the share of the
largest class, so these are ours, on OpenCV; any
other albumentations transform can stand beside them in a config. Sources: mmcv
``transforms/processing.py`` (RandomResize), MMSegmentation ``datasets/transforms/transforms.py``
(RandomCrop) and ``models/data_preprocessor.py`` (padding).

Images are uint8 (H, W, 3) RGB, masks uint8 (H, W) with 255 = ignore; all lengths are pixels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
from albumentations import DualTransform
from albumentations.core.type_definitions import Targets

from seglab.data.sources.source import IGNORE_INDEX, Pixels, Shape
from seglab.data.transforms.resizing import (
    CropBox,
    fit_size,
    resize_image,
    resize_image_window,
    resize_mask,
    resize_mask_window,
)

MEAN_COLOR = (124, 116, 104)
"""ImageNet's mean colour, rounded: what is 0 after normalization, as nearly as uint8 can say it."""

MEAN_GREY = 127.5
"""Padding of images that are no RGB; better give `Pad` the bands' own means."""

_N_REDRAWS = 10
_TARGETS = (Targets.IMAGE, Targets.MASK)


def has_mixed_classes(mask: Pixels, cat_max_ratio: float) -> bool:
    """Tell whether a mask has two classes or more and none above a share of its valid pixels.

    >>> half = np.repeat(np.uint8([[0, 1]]), 4, axis=0)
    >>> has_mixed_classes(half, 0.75), has_mixed_classes(half, 0.5)
    (True, False)
    """
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel()[:IGNORE_INDEX]
    return bool((counts > 0).sum() > 1 and counts.max() < cat_max_ratio * counts.sum())


def _check_ratio(ratio: tuple[float, float]) -> None:
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio={ratio} of a random resize must be two rising positive factors")


def _draw_size(
    rng: np.random.Generator,
    shape: Shape,
    scale: tuple[int, int] | None,
    ratio: tuple[float, float],
) -> Shape:
    factor = rng.uniform(*ratio)
    long, short = scale or shape
    return fit_size(shape, (int(long * factor), int(short * factor)))


def _draw_window(
    rng: np.random.Generator,
    shape: Shape,
    crop: Shape,
    cat_max_ratio: float,
    cut_mask: Callable[[CropBox], Pixels],
) -> tuple[CropBox, Pixels]:
    """Draw windows inside a shape until what `cut_mask` shows of one is mixed enough."""
    height, width = min(crop[0], shape[0]), min(crop[1], shape[1])
    for _ in range(_N_REDRAWS + 1):
        top = int(rng.integers(0, shape[0] - height + 1))
        left = int(rng.integers(0, shape[1] - width + 1))
        window = top, left, height, width
        mask = cut_mask(window)
        if cat_max_ratio >= 1 or has_mixed_classes(mask, cat_max_ratio):
            break
    return window, mask


def _cut(pixels: Pixels, window: CropBox) -> Pixels:
    top, left, height, width = window
    return pixels[top : top + height, left : left + width]


class RandomResize(DualTransform):  # type: ignore[misc]
    """Resize into a box of random size, keeping the image's ratio.

    Args:
        scale: (long, short) sides of the box at ratio 1; the image's own sides when None.
        ratio: Lowest and highest factor of the box, drawn uniformly.
        p: Probability.

    >>> transform = RandomResize(scale=(128, 64), ratio=(0.5, 0.5))
    >>> transform(image=np.zeros((100, 120, 3), np.uint8))["image"].shape
    (32, 38, 3)
    """

    _targets = _TARGETS

    def __init__(
        self,
        scale: tuple[int, int] | None = None,
        ratio: tuple[float, float] = (0.5, 2.0),
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        _check_ratio(ratio)
        self.scale = scale
        self.ratio = ratio

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the factor and fit the image's shape into the box."""
        shape = params["shape"][:2]
        return {"size": _draw_size(self.random_generator, shape, self.scale, self.ratio)}

    def apply(self, img: Pixels, size: Shape, **params: Any) -> Pixels:
        """Resize the image bilinearly."""
        return resize_image(img, size)

    def apply_to_mask(self, mask: Pixels, size: Shape, **params: Any) -> Pixels:
        """Resize the mask by nearest neighbour."""
        return resize_mask(mask, size)


class RandomCrop(DualTransform):  # type: ignore[misc]
    """Cut a window; redraw while one class fills too much of it.

    Up to ten redraws until the window has at least two classes, none with `cat_max_ratio` or
    more of the pixels that are not ignored; the last draw is kept in any case. An image smaller
    than the window is cut less, and filled up by `Pad`.

    Args:
        height: Height of the window.
        width: Width of the window.
        cat_max_ratio: Largest share of one class; 1 takes the first draw.
        p: Probability.

    >>> crop = RandomCrop(8, 8)
    >>> crop(image=np.zeros((9, 5, 3), np.uint8), mask=np.zeros((9, 5), np.uint8))["image"].shape
    (8, 5, 3)
    """

    _targets = _TARGETS

    def __init__(
        self, height: int, width: int, cat_max_ratio: float = 0.75, p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.cat_max_ratio = cat_max_ratio

    @property
    def targets_as_params(self) -> list[str]:
        """The mask decides which windows are taken."""
        return ["mask"]

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw windows until one is mixed enough."""
        mask, crop = data["mask"], (self.height, self.width)
        draw = partial(_draw_window, self.random_generator, mask.shape, crop)
        window, _ = draw(self.cat_max_ratio, partial(_cut, mask))
        return {"window": window}

    def apply(self, img: Pixels, window: CropBox, **params: Any) -> Pixels:
        """Cut the image."""
        return _cut(img, window)

    def apply_to_mask(self, mask: Pixels, window: CropBox, **params: Any) -> Pixels:
        """Cut the mask."""
        return _cut(mask, window)


class RandomResizeCrop(DualTransform):  # type: ignore[misc]
    """`RandomResize`, then `RandomCrop`, computing only the pixels that are kept.

    The same draws in the same order; masks are equal to those of the two transforms, images up
    to one grey level (`seglab.data.transforms.resizing`). Up to four times faster on large images.

    Args:
        height: Height of the window.
        width: Width of the window.
        scale: See `RandomResize`.
        ratio: See `RandomResize`.
        cat_max_ratio: See `RandomCrop`.
        p: Probability.

    >>> transform = RandomResizeCrop(16, 16, scale=(64, 32))
    >>> image, mask = np.zeros((90, 60, 3), np.uint8), np.zeros((90, 60), np.uint8)
    >>> transform(image=image, mask=mask)["mask"].shape
    (16, 16)
    """

    def __init__(
        self,
        height: int,
        width: int,
        scale: tuple[int, int] | None = None,
        ratio: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        _check_ratio(ratio)
        self.height = height
        self.width = width
        self.scale = scale
        self.ratio = ratio
        self.cat_max_ratio = cat_max_ratio

    @property
    def targets_as_params(self) -> list[str]:
        """The mask decides which windows are taken."""
        return ["mask"]

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the size, then windows of it until one is mixed enough."""
        mask, crop = data["mask"], (self.height, self.width)
        size = _draw_size(self.random_generator, mask.shape, self.scale, self.ratio)
        draw = partial(_draw_window, self.random_generator, size, crop)
        window, cut = draw(self.cat_max_ratio, partial(resize_mask_window, mask, size))
        return {"size": size, "window": window, "cut": cut}

    def apply(self, img: Pixels, size: Shape, window: CropBox, **params: Any) -> Pixels:
        """Compute the window of the resized image."""
        return resize_image_window(img, size, window)

    def apply_to_mask(self, mask: Pixels, cut: Pixels, **params: Any) -> Pixels:
        """Return the window of the resized mask, computed while drawing."""
        return cut


class Pad(DualTransform):  # type: ignore[misc]
    """Fill up to a size at the right and the bottom.

    MMSegmentation pads after normalization with 0, which is the mean colour; here padding comes
    before (the network normalizes), so the default fill is the mean colour as nearly as whole
    numbers can say it: off by at most 0.5 grey levels, 0.01 after normalization. Its VOC recipes
    pad raw pixels with 0 instead: ``fill=(0, 0, 0)``.

    Args:
        height: Smallest height of the result.
        width: Smallest width of the result.
        fill: Colour for the image: one value, or one per band.
        fill_mask: Value for the mask.
        p: Probability.

    >>> padded = Pad(4, 4)(image=np.zeros((2, 3, 3), np.uint8), mask=np.zeros((2, 3), np.uint8))
    >>> padded["image"][3, 3].tolist(), padded["mask"][0].tolist()
    ([124, 116, 104], [0, 0, 0, 255])
    """

    _targets = _TARGETS

    def __init__(
        self,
        height: int,
        width: int,
        fill: float | tuple[float, ...] = MEAN_COLOR,
        fill_mask: int = IGNORE_INDEX,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.fill = fill
        self.fill_mask = fill_mask

    def apply(self, img: Pixels, **params: Any) -> Pixels:
        """Fill the image."""
        return self._pad(img, self.fill)

    def apply_to_mask(self, mask: Pixels, **params: Any) -> Pixels:
        """Fill the mask."""
        return self._pad(mask, self.fill_mask)

    def _pad(self, array: Pixels, value: Any) -> Pixels:
        bottom, right = max(self.height - len(array), 0), max(self.width - array.shape[1], 0)
        if not bottom and not right:
            return array
        padded = np.empty(
            (len(array) + bottom, array.shape[1] + right, *array.shape[2:]), array.dtype
        )
        padded[...] = value
        padded[: len(array), : array.shape[1]] = array
        return padded
