"""Decode image and mask files; say which file is wrong, and how.

cv2 decodes images (as fast as dedicated JPEG packages on these files), PIL decodes masks, because
cv2 turns the indices of a palette PNG into colours.
"""

from pathlib import Path

import numpy as np

from seglab.data.errors import DataError
from seglab.data.sources.source import Pixels, Shape

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
_TRAILERS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}  # JPEG, PNG: how a whole file ends
_MASK_MODES = ("L", "P", "1")


def read_image(path: Path) -> Pixels:
    """Read an image as stored (EXIF orientation ignored, as masks have none).

    Args:
        path: The file.

    Returns:
        uint8 (H, W, 3) RGB; 16-bit and grey images are converted, alpha is dropped.

    Raises:
        DataError: If the file cannot be read or is cut short.
    """
    import cv2

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read image {path}: {error.strerror}") from error
    _check_complete(path, content)
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image: Pixels | None = (
        cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    )
    if image is None:
        raise DataError(
            f"cannot decode image {path} ({len(content)} bytes); replace it or remove the pair"
        )
    return image


def read_mask(path: Path) -> Pixels:
    """Read a single-channel mask: the indices of a palette PNG, the values of a grey one.

    Returns:
        uint8 (H, W).

    Raises:
        DataError: If the file cannot be read, is cut short, or is no 8-bit single-channel image.
    """
    if path.suffix == ".mat":
        return _read_sbd(path)
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.mode not in _MASK_MODES:
                raise DataError(
                    f"mask {path} has mode {file.mode!r}, not one 8-bit channel; save class ids "
                    "as an 8-bit grey or palette PNG (colour masks must be turned into ids first)"
                )
            return np.array(file, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot decode mask {path}: {error}; replace it") from error


def read_shape(path: Path) -> Shape:
    """Return height and width from the file's header (SBD's .mat files are read whole).

    Raises:
        DataError: If there is no readable header.
    """
    if path.suffix == ".mat":
        height, width = _read_sbd(path).shape
        return height, width
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.height, file.width
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the header of {path}: {error}; replace the file") from error


def _read_sbd(path: Path) -> Pixels:
    """The class labels of one of SBD's ``cls/*.mat`` files."""
    from scipy.io import loadmat

    try:
        mask: Pixels = loadmat(str(path))["GTcls"][0]["Segmentation"][0]
    except Exception as error:  # scipy raises whatever the broken bytes lead it to
        raise DataError(f"cannot read SBD labels {path}: {error}; unpack again") from error
    return np.ascontiguousarray(mask, dtype=np.uint8)


def _check_complete(path: Path, content: bytes) -> None:
    """Decoders fill what is missing from a cut file with grey and only print a warning."""
    trailer = _TRAILERS.get(content[:2])
    if trailer is None or trailer in content[-64:]:
        return
    from PIL import Image

    try:  # some cameras append data, so the last word is a strict decoder's
        with Image.open(path) as file:
            file.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"image {path} is cut short ({len(content)} bytes): {error}; replace the file"
        ) from error
