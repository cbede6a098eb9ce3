"""Photometric distortion as SSD and MMSegmentation do it, by look-up tables."""

from typing import Any

import cv2
import numpy as np
from albumentations import ImageOnlyTransform

from seglab.data.dataset import Pixels


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
