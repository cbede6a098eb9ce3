"""Decode mask files: class ids, other ids, or colours."""

from pathlib import Path

import numpy as np

from seglab.data.errors import DataError, UnreadableError
from seglab.data.sources.reading import TIFF_SUFFIXES, Array, decode_image, read_npy

MASK_SUFFIXES = (".png", ".bmp", *TIFF_SUFFIXES, ".npy")


def read_mask(path: Path) -> Array:
    """Read a mask as stored.

    Returns:
        uint8 or integer (H, W): the indices of a palette PNG, the values of a grey file; or uint8
        (H, W, 3) of a file of colours, whose alpha is left out.

    Raises:
        DataError: If the file cannot be read, is cut short, or holds fractions.
    """
    suffix = path.suffix.lower()
    if suffix == ".mat":
        return _read_sbd(path)
    if suffix == ".npy":
        mask = read_npy(path)
    elif suffix in TIFF_SUFFIXES:
        mask = decode_image(path)
    else:
        mask = _read_with_pillow(path)
    return _check(mask, path)


def _read_with_pillow(path: Path) -> Array:
    """Pillow gives the indices of palette files; OpenCV would turn them into colours."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            has_alpha = file.mode in ("RGBA", "LA", "PA")
            mask = np.array(file.convert("RGBA") if has_alpha else file)
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableError(f"cannot decode mask {path}: {error}; replace it") from error
    return _without_alpha(mask, path) if has_alpha else mask


def _without_alpha(mask: Array, path: Path) -> Array:
    """The colours of a mask; those that differ in their transparency alone are refused."""
    colors, alpha = mask[..., :3], mask[..., 3]
    if (colors == colors[:1, :1]).all() and alpha.min() < alpha.max():
        raise DataError(
            f"mask {path} is of one colour, and differs in its transparency alone, which is not "
            "read: save the alpha channel as a grey PNG"
        )
    return np.ascontiguousarray(colors)


def _check(mask: Array, path: Path) -> Array:
    """Bring a mask to integers, (H, W) or (H, W, 3); refuse what is neither ids nor colours."""
    if mask.dtype == np.bool_:
        return mask.astype(np.uint8)
    if mask.ndim == 3 and mask.shape[2] == 1:
        mask = mask[..., 0]
    if mask.dtype.kind == "f" and np.array_equal(mask, mask.round()):
        mask = mask.astype(np.int64)
    if mask.dtype.kind not in "ui":
        raise DataError(f"mask {path} holds fractions ({mask.dtype}); save class ids as integers")
    if mask.ndim == 3:
        if mask.shape[2] not in (3, 4) or mask.dtype != np.uint8:
            raise DataError(
                f"mask {path} has {mask.shape[2]} bands of {mask.dtype}; save class ids in "
                "one band, or 8-bit RGB colours with data.colors"
            )
        return np.ascontiguousarray(mask[..., :3])
    return mask


def _read_sbd(path: Path) -> Array:
    """The class labels of one of SBD's ``cls/*.mat`` files."""
    from scipy.io import loadmat

    try:
        mask = loadmat(str(path))["GTcls"][0]["Segmentation"][0]
    except Exception as error:  # scipy raises whatever the broken bytes lead it to
        raise UnreadableError(f"cannot read SBD labels {path}: {error}; unpack again") from error
    return np.ascontiguousarray(mask, dtype=np.uint8)
