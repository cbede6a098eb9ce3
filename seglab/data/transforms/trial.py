"""Try the transforms of a config on a small image, and refuse those that would spoil the data.

Decided by what they do, not by their names: albumentations clips float images to 0..1 without a
word, fills what a rotation uncovers with class 0, and OpenCV says nothing clear of five bands.
"""

import copy
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seglab.data.errors import DataError
from seglab.data.sources.source import IGNORE_INDEX, Pixels
from seglab.data.transforms.augment import walk

if TYPE_CHECKING:
    from albumentations import BaseCompose, BasicTransform

_SIDE = 48
_N_DRAWS = 8  # a transform may leave an image alone now and then
_CLASSES = (3, 200)


def refuse_label_changes(transforms: "Sequence[BasicTransform | BaseCompose]") -> None:
    """Refuse transforms that put labels into a mask that were not in it, other than 255.

    Args:
        transforms: Of a config.

    Raises:
        DataError: If one does.

    >>> from albumentations import Rotate
    >>> refuse_label_changes([Rotate(fill_mask=255)])
    >>> refuse_label_changes([Rotate()])
    Traceback (most recent call last):
    seglab.data.errors.DataError: data.transforms: Rotate labels pixels 0 that have no label...
    """
    pixels, mask = _probe(3, np.uint8)
    for part in _leaves(transforms):
        for draw in range(_N_DRAWS):
            try:
                result = _run(part, pixels, mask, draw)["mask"]
            except Exception:  # a crop may fail on an image that is too small for it
                break
            new = sorted({*np.unique(result).tolist()} - {*_CLASSES, IGNORE_INDEX})
            if new:
                raise DataError(
                    f"data.transforms: {type(part).__name__} labels pixels {new[0]} that have no "
                    "label: set its fill_mask to 255 (ignored), and no interpolation of masks but "
                    "nearest"
                )


def refuse_unfit(
    transforms: "Sequence[BasicTransform | BaseCompose]", channels: int, is_deep: bool
) -> None:
    """Refuse transforms that cannot work on images of these bands and depth.

    Args:
        transforms: Of a config.
        channels: Bands of the images.
        is_deep: Images are float32 in 0..255, else uint8.

    Raises:
        DataError: If one that changes pixel values, or pads, fails; or if any changes the number of
            bands, the type or the range of values.

    >>> from albumentations import HorizontalFlip, ToSepia
    >>> refuse_unfit([HorizontalFlip()], channels=4, is_deep=True)
    >>> refuse_unfit([ToSepia()], channels=4, is_deep=False)
    Traceback (most recent call last):
    seglab.data.errors.DataError: data.transforms: ToSepia cannot work on uint8 images...
    """
    pixels, mask = _probe(channels, np.float32 if is_deep else np.uint8)
    for part in _leaves(transforms):
        faults = (_fault(part, pixels, mask, draw) for draw in range(_N_DRAWS))
        fault = next(filter(None, faults), None)
        if fault is not None:
            raise DataError(
                f"data.transforms: {type(part).__name__} cannot work on {pixels.dtype} images of "
                f"{channels} band(s) ({fault}): leave it out; BandDistortion of "
                "seglab.data.transforms can, and Pad with one fill or one per band"
            )


def _probe(channels: int, dtype: Any) -> tuple[Pixels, Pixels]:
    """An image of values in 64..191, and a mask of two halves."""
    values = np.random.default_rng(0).integers(64, 192, (_SIDE, _SIDE, channels))
    mask = np.array([_CLASSES], np.uint8).repeat(_SIDE // 2, axis=1).repeat(_SIDE, axis=0)
    return values.astype(dtype), mask


def _leaves(transforms: "Sequence[BasicTransform | BaseCompose]") -> Iterator[Any]:
    from albumentations import BaseCompose

    for transform in transforms:
        yield from (part for part in walk(transform) if not isinstance(part, BaseCompose))


def _run(part: Any, pixels: Pixels, mask: Pixels, draw: int) -> dict[str, Any]:
    """Apply a copy of a transform, with random numbers of its own."""
    transform = copy.deepcopy(part)
    transform.p = 1.0
    transform.random_generator = np.random.default_rng(draw)
    transform.py_random = random.Random(draw)
    result: dict[str, Any] = transform(image=pixels.copy(), mask=mask.copy())
    return result


def _fault(part: Any, pixels: Pixels, mask: Pixels, draw: int) -> str | None:
    """What is wrong with what a transform makes of an image, None if nothing is."""
    from albumentations import ImageOnlyTransform

    from seglab.data.transforms.geometry import Pad

    if isinstance(part, Pad):
        pixels, mask = pixels[:1, :1], mask[:1, :1]
    try:
        result = _run(part, pixels, mask, draw)["image"]
    except Exception as error:  # whatever it is not made for
        if isinstance(part, (ImageOnlyTransform, Pad)):
            return " ".join(str(error).split())[:120] or type(error).__name__
        return None  # a crop may fail on an image that is too small for it
    if result.dtype != pixels.dtype:
        return f"it makes {result.dtype} of them"
    if result.ndim != 3 or result.shape[2] != pixels.shape[2]:
        return f"it makes the shape {result.shape} of {pixels.shape}"
    low, high = float(result.min()), float(result.max())
    if not 4 < high < 512:  # far beyond what a distortion in 0..255 makes of 64..191
        return f"it takes values in 0..255 to {low:g}..{high:g}"
    return None
