"""Take images that are in memory: arrays, tensors and PIL images, as files would be read."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from seglab.data.errors import DataError
from seglab.data.sources.reading import Array

KINDS = "a path, a PIL image, an array (H, W, C) or (H, W), or a tensor (C, H, W)"

_TURNED_FORMATS = (None, "JPEG", "MPO")  # of files, only photographs are turned; None: edited


def to_array(image: Any) -> Array:
    """Turn an image in memory into an array (H, W, C) or (H, W), values as they are.

    Raises:
        DataError: It is no image, has no pixels, or its file is damaged.
    """
    if isinstance(image, Tensor):
        array = _from_tensor(image)
    elif isinstance(image, np.ndarray):
        array = image
    elif hasattr(image, "convert"):
        array = _from_pil(image)
    else:
        raise DataError(f"predict takes {KINDS}, not {type(image).__name__}")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise DataError(f"predict takes {KINDS}, got shape {array.shape}")
    if array.dtype.kind not in "uif":
        raise DataError(f"the image holds {array.dtype} values: give numbers, such as uint8")
    return array


def _from_tensor(image: Tensor) -> Array:
    image = image.detach().cpu()
    if image.is_floating_point():
        image = image.float()  # numpy knows no bfloat16
    array: Array = image.numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def _from_pil(image: Any) -> Array:
    """Turn a photograph as its EXIF orientation says; palettes become colours."""
    from PIL import Image, ImageOps

    try:
        image.load()
        turned = ImageOps.exif_transpose(image) if image.format in _TURNED_FORMATS else image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = getattr(image, "filename", "") or "given to predict"
        raise DataError(f"cannot decode image {name}: {error}; replace it") from error
    if "transparency" in turned.info and turned.mode in ("P", "L", "RGB", "1"):
        return np.asarray(turned.convert("RGBA"))
    if turned.mode in ("P", "1", "CMYK", "YCbCr", "LAB", "HSV"):
        turned = turned.convert("RGB")
    if turned.mode in ("LA", "PA"):
        turned = turned.convert("RGBA")
    return np.asarray(turned)
