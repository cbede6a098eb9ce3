"""Photometric distortion as SSD and MMSegmentation do it, without floating-point images."""

from collections.abc import Callable
from math import floor
from typing import Any

import cv2
import numpy as np
from albumentations import ImageOnlyTransform

from seglab.data.sources.source import Pixels


class PhotoMetricDistortion(ImageOnlyTransform):  # type: ignore[misc]
    """Brightness, contrast, saturation and hue, each with probability 1/2, in SSD's order.

    Brightness, [contrast], saturation, hue, [contrast]: a coin decides at which of the two places
    contrast stands. Values are clipped to 0..255 and cut to whole numbers after each step.
    Saturation and hue (OpenCV's HSV: hue 0..179) convert there and back each, as MMSegmentation
    does: a conversion rounds, and one for both would leave images 0.2 grey levels brighter.

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
        coins, amounts = self.random_generator.random((2, 5)).tolist()
        low, high = self.contrast
        low_saturation, high_saturation = self.saturation
        return {
            "contrast_first": coins[4] < 0.5,
            "shift": self.brightness * (2 * amounts[0] - 1) if coins[0] < 0.5 else None,
            "contrast": low + (high - low) * amounts[1] if coins[1] < 0.5 else None,
            "saturation": low_saturation + (high_saturation - low_saturation) * amounts[2]
            if coins[2] < 0.5
            else None,
            "hue": floor(2 * self.hue * amounts[3]) - self.hue if coins[3] < 0.5 else None,
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
        if shift is not None:
            img = _shift(img, floor(shift))
        if contrast_first and contrast is not None:
            img = _scale(img, contrast)
        if saturation is not None:
            img = _change_plane(img, 1, lambda plane: _scale(plane, saturation))
        if hue is not None:
            img = _change_plane(img, 0, lambda plane: cv2.LUT(plane, _turned_by(hue)))
        if not contrast_first and contrast is not None:
            img = _scale(img, contrast)
        return img


class BandDistortion(ImageOnlyTransform):  # type: ignore[misc]
    """Brightness and contrast, the same for all bands, each with probability 1/2.

    For images that are no RGB: ratios of bands, which carry the meaning there, change little.
    8-bit values are clipped to 0..255, others left as they come.

    Args:
        brightness: Largest shift, in 0..255.
        contrast: Range of the factor about the image's mean.
        p: Probability of the whole.

    >>> image = np.full((2, 2, 5), 100, np.float32)
    >>> bool(np.ptp(BandDistortion()(image=image)["image"]) == 0)
    True
    """

    def __init__(
        self, brightness: float = 32, contrast: tuple[float, float] = (0.5, 1.5), p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.brightness = brightness
        self.contrast = contrast

    def get_params(self) -> dict[str, Any]:
        """Draw shift and factor; 0 and 1 where a coin leaves them out."""
        coins, amounts = self.random_generator.random((2, 2)).tolist()
        low, high = self.contrast
        return {
            "shift": self.brightness * (2 * amounts[0] - 1) if coins[0] < 0.5 else 0.0,
            "factor": low + (high - low) * amounts[1] if coins[1] < 0.5 else 1.0,
        }

    def apply(self, img: Pixels, shift: float, factor: float, **params: Any) -> Pixels:
        """Apply the drawn amounts to an image (H, W, C)."""
        wide = img.astype(np.float32)
        mean = wide.mean((0, 1), keepdims=True)
        changed = (wide - mean) * np.float32(factor) + mean + np.float32(shift)
        if img.dtype == np.uint8:
            changed = changed.round().clip(0, 255)
        distorted: Pixels = changed.astype(img.dtype)
        return distorted


def _shift(image: Pixels, amount: int) -> Pixels:
    """Add and clip; cutting a sum with a fraction to whole numbers adds the fraction's floor."""
    shifted: Pixels = cv2.add(image, (amount, amount, amount, 0))
    return shifted


def _scale(values: Pixels, factor: float) -> Pixels:
    """Multiply, clip and cut to whole numbers (OpenCV rounds, so almost a half goes first)."""
    scaled: Pixels = cv2.convertScaleAbs(values, alpha=factor, beta=-_ALMOST_HALF)
    return scaled


def _change_plane(image: Pixels, index: int, change: Callable[[Pixels], Pixels]) -> Pixels:
    """Change hue (0), saturation (1) or value (2) of an RGB image."""
    planes = list(cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)))
    planes[index] = change(planes[index])
    changed: Pixels = cv2.cvtColor(cv2.merge(planes), cv2.COLOR_HSV2RGB)
    return changed


def _turned_by(hue: int) -> Pixels:
    return _HUES[hue % 180 : hue % 180 + 256]


_ALMOST_HALF = 0.49998
_HUES = (np.arange(180 + 256) % 180).astype(np.uint8)  # from place h on: hue + h, modulo 180
