"""Training transforms in MMSegmentation's order and semantics, as albumentations transforms.

albumentations has no keep-ratio resize into a scaled box, no crop that bounds the share of the
largest class and no photometric distortion in SSD's order, so these are ours, on OpenCV; any
other albumentations transform can stand beside them in a config. Sources: mmcv
``transforms/processing.py`` (RandomResize), MMSegmentation ``datasets/transforms/transforms.py``
(RandomCrop, PhotoMetricDistortion) and ``models/data_preprocessor.py`` (padding).

Images are uint8 (H, W, 3) RGB, masks uint8 (H, W) with 255 = ignore; all lengths are pixels.
"""

from typing import Any

import cv2
import numpy as np
from albumentations import BasicTransform, DualTransform, HorizontalFlip, ImageOnlyTransform
from albumentations.core.type_definitions import Targets

from seglab.data.dataset import IGNORE_INDEX, Pixels, Shape

MEAN_COLOR = (124, 116, 104)
"""ImageNet's mean colour, rounded: what is 0 after normalization, as nearly as uint8 can say it."""

_TARGETS = (Targets.IMAGE, Targets.MASK)


def fit_size(shape: Shape, box: tuple[int, int]) -> Shape:
    """Return the largest size of the same ratio that fits into a box, as mmcv rounds it.

    Args:
        shape: Height and width.
        box: The box's sides in any order; its long side bounds the image's long side.

    >>> fit_size((360, 480), (2048, 512))
    (512, 683)
    """
    factor = min(max(box) / max(shape), min(box) / min(shape))
    height, width = (int(side * factor + 0.5) for side in shape)
    return max(1, height), max(1, width)


def resize_image(image: Pixels, shape: Shape) -> Pixels:
    """Resize bilinearly, without antialiasing, as MMSegmentation does; (H, W, 3) -> (*shape, 3)."""
    if image.shape[:2] == shape:
        return image
    resized: Pixels = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_LINEAR)
    return resized


def resize_mask(mask: Pixels, shape: Shape) -> Pixels:
    """Resize by nearest neighbour, (H, W) -> shape."""
    if mask.shape == shape:
        return mask
    resized: Pixels = cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST)
    return resized


def has_mixed_classes(mask: Pixels, cat_max_ratio: float) -> bool:
    """Tell whether a mask has two classes or more and none above a share of its valid pixels.

    >>> half = np.repeat(np.uint8([[0, 1]]), 4, axis=0)
    >>> has_mixed_classes(half, 0.75), has_mixed_classes(half, 0.5)
    (True, False)
    """
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256]).ravel()[:IGNORE_INDEX]
    return bool((counts > 0).sum() > 1 and counts.max() < cat_max_ratio * counts.sum())


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
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"RandomResize(ratio={ratio}) must be two rising positive factors")
        self.scale = scale
        self.ratio = ratio

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the factor and fit the image's shape into the box."""
        shape = params["shape"][:2]
        factor = self.random_generator.uniform(*self.ratio)
        long, short = self.scale or shape
        return {"size": fit_size(shape, (int(long * factor), int(short * factor)))}

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
        mask = data["mask"]
        window = self._draw(mask.shape)
        for _ in range(10 if self.cat_max_ratio < 1 else 0):
            if has_mixed_classes(mask[window], self.cat_max_ratio):
                break
            window = self._draw(mask.shape)
        return {"window": window}

    def _draw(self, shape: Shape) -> tuple[slice, slice]:
        top = int(self.random_generator.integers(0, max(shape[0] - self.height, 0) + 1))
        left = int(self.random_generator.integers(0, max(shape[1] - self.width, 0) + 1))
        return slice(top, top + self.height), slice(left, left + self.width)

    def apply(self, img: Pixels, window: tuple[slice, slice], **params: Any) -> Pixels:
        """Cut the image."""
        return img[window]

    def apply_to_mask(self, mask: Pixels, window: tuple[slice, slice], **params: Any) -> Pixels:
        """Cut the mask."""
        return mask[window]


class PhotoMetricDistortion(ImageOnlyTransform):  # type: ignore[misc]
    """Brightness, contrast, saturation and hue, each with probability 1/2, in SSD's order.

    Brightness, [contrast], saturation, hue, [contrast]: a coin decides at which of the two places
    contrast stands. Values are clipped to 0..255 and cut to whole numbers after each step, by
    look-up tables, which give exactly the numbers of the arithmetic. Saturation and hue (OpenCV's
    HSV: hue 0..179) share one conversion; MMSegmentation converts twice, which rounds once more.

    Args:
        brightness: Largest shift.
        contrast: Range of the factor.
        saturation: Range of the factor.
        hue: Shifts are whole numbers in [-hue, hue), modulo 180.
        p: Probability of the whole.

    >>> grey = np.full((2, 2, 3), 100, np.uint8)
    >>> bool(np.ptp(PhotoMetricDistortion()(image=grey)["image"]) == 0)  # grey stays grey
    True
    """

    def __init__(
        self,
        brightness: float = 32,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: int = 18,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.hue = hue

    def get_params(self) -> dict[str, Any]:
        """Draw the steps; None where a coin leaves a step out."""
        rng = self.random_generator
        shift, contrast, saturation, hue = rng.random(4) < 0.5
        return {
            "contrast_first": bool(rng.random() < 0.5),
            "shift": rng.uniform(-self.brightness, self.brightness) if shift else None,
            "contrast": rng.uniform(*self.contrast) if contrast else None,
            "saturation": rng.uniform(*self.saturation) if saturation else None,
            "hue": int(rng.integers(-self.hue, self.hue)) if hue else None,
        }

    def apply(
        self,
        img: Pixels,
        contrast_first: bool,
        shift: float | None,
        contrast: float | None,
        saturation: float | None,
        hue: int | None,
        **params: Any,
    ) -> Pixels:
        """Apply the drawn steps to an image (H, W, 3)."""
        table = _scale(_LEVELS, offset=shift)
        if contrast_first:
            table = _scale(table, contrast)
        if shift is not None or (contrast_first and contrast is not None):
            img = cv2.LUT(img, table)
        if saturation is not None or hue is not None:
            img = _distort_hsv(img, saturation, hue or 0)
        if not contrast_first and contrast is not None:
            img = cv2.LUT(img, _scale(_LEVELS, contrast))
        return img


_LEVELS = np.arange(256, dtype=np.uint8)


def _scale(table: Pixels, factor: float | None = None, offset: float | None = None) -> Pixels:
    values = table.astype(np.float32) * np.float32(1 if factor is None else factor)
    shifted: Pixels = (values + np.float32(offset or 0)).clip(0, 255).astype(np.uint8)
    return shifted


def _distort_hsv(image: Pixels, saturation: float | None, hue: int) -> Pixels:
    tables = np.stack([(_LEVELS.astype(int) + hue) % 180, _scale(_LEVELS, saturation), _LEVELS], -1)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    distorted: Pixels = cv2.cvtColor(cv2.LUT(hsv, tables[None].astype(np.uint8)), cv2.COLOR_HSV2RGB)
    return distorted


class Pad(DualTransform):  # type: ignore[misc]
    """Fill up to a size at the right and the bottom.

    MMSegmentation pads after normalization with 0, which is the mean colour; here padding comes
    before (the network normalizes), so the default fill is the mean colour as nearly as whole
    numbers can say it: off by at most 0.5 grey levels, 0.01 after normalization. Its VOC recipes
    pad raw pixels with 0 instead: ``fill=(0, 0, 0)``.

    Args:
        height: Smallest height of the result.
        width: Smallest width of the result.
        fill: RGB colour for the image.
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
        fill: tuple[int, int, int] = MEAN_COLOR,
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
        padded: Pixels = cv2.copyMakeBorder(
            array, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=value
        )
        return padded


def standard_transforms(
    crop_size: Shape,
    scale: tuple[int, int] | None = None,
    ratio: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    fill: tuple[int, int, int] = MEAN_COLOR,
) -> list[BasicTransform]:
    """Return the training transforms of MMSegmentation's recipes.

    Args:
        crop_size: Height and width of what the network sees.
        scale: See `RandomResize`; (2048, 512) for ADE20K and VOC, (2048, 1024) for Cityscapes.
        ratio: See `RandomResize`.
        cat_max_ratio: See `RandomCrop`.
        fill: See `Pad`.

    >>> [type(t).__name__ for t in standard_transforms((64, 64))]
    ['RandomResize', 'RandomCrop', 'HorizontalFlip', 'PhotoMetricDistortion', 'Pad']
    """
    height, width = crop_size
    return [
        RandomResize(scale, ratio),
        RandomCrop(height, width, cat_max_ratio),
        HorizontalFlip(p=0.5),
        PhotoMetricDistortion(),
        Pad(height, width, fill),
    ]
