"""Decode image files of any usual depth and number of bands; say which file is wrong, and how.

OpenCV decodes JPEG, PNG, BMP, WebP and PPM (as fast as dedicated packages on these files), tifffile
TIFF in all its layouts and compressions, numpy NPY.
"""

from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from seglab.data.errors import DataError, FormatError, UnreadableError
from seglab.data.sources.source import Pixels, Shape

TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", *TIFF_SUFFIXES, ".webp", ".ppm", ".npy")
Array = NDArray[Any]  # (H, W) or (H, W, C) as stored

_TRAILERS = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND"}  # JPEG, PNG: how a whole file ends
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG"
_PIL_ERRORS = (OSError, SyntaxError, ValueError)
_FAR_OUTSIDE = 255e3  # after scaling to 0..255: no measurement, and would drown the others
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 exchange height and width
_AXES = {"YX": (0, 1), "YXS": (0, 1, 2), "YXC": (0, 1, 2)} | {
    f"{band}YX": (1, 2, 0) for band in "SCIQZ"
}  # of tifffile: how to bring an array to (H, W[, C])


class ImageFormat(NamedTuple):
    """What image files hold, and how it becomes what a network takes.

    Args:
        channels: Bands of every image. Grey images become three equal bands where 3 are asked for,
            and three equal bands one where 1 is.
        value_range: Raw values that become 0 and 255, linearly and without clipping, in float32;
            None: files are 8-bit and stay as they are.
        drop_alpha: Leave out the fourth band of images that are transparent somewhere; else they
            are refused, since a fourth band may be data. Opaque ones lose it in any case.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None
    drop_alpha: bool = False

    def __str__(self) -> str:
        """As "8-bit images of 3 bands".

        >>> str(ImageFormat(4, (0, 65535)))
        'images of 4 bands with values in 0..65535'
        """
        n = f"{self.channels} band{'s' * (self.channels > 1)}"
        if self.value_range is None:
            return f"8-bit images of {n}"
        low, high = self.value_range
        return f"images of {n} with values in {low:g}..{high:g}"

    @property
    def is_rgb(self) -> bool:
        """Whether images are 8-bit RGB."""
        return self.channels == 3 and self.value_range is None

    def convert(self, array: Array, path: Path) -> Pixels:
        """Turn what a file holds into (H, W, channels), uint8 or float32 in 0..255.

        Raises:
            DataError: If the number of bands or the type of values is not as stated.
        """
        image = self._with_channels(array if array.ndim == 3 else array[..., None], path)
        if self.value_range is None:
            if image.dtype != np.uint8:
                raise _wrong_depth(image, path)
            return np.ascontiguousarray(image)
        low, high = self.value_range
        if image.dtype == np.uint8 and high > 255:
            raise FormatError(
                f"image {path} is 8-bit, so nearly black",
                f" in data.value_range {[low, high]}; save all images in one depth",
                "data.value_range",
            )
        with np.errstate(over="ignore"):
            scaled = (image.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
        _check_values(image, scaled, path)
        return cast("Pixels", scaled)

    def _with_channels(self, image: Array, path: Path) -> Array:
        found = image.shape[2]
        if found == 1 and self.channels == 3:
            return np.repeat(image, 3, axis=2)
        if self.channels == 1 and found == 3 and (image == image[..., :1]).all():
            return image[..., :1]  # decoders make colours of 8-bit grey
        if found == 4 and self.channels == 3 and image.dtype == np.uint8:
            if self.drop_alpha or (image[..., 3] == 255).all():
                return image[..., :3]
            raise FormatError(
                f"image {path} has a fourth band that is not opaque everywhere",
                "; set data.channels: 4 if it is data, or data.drop_alpha: true if it is "
                "transparency",
                "data.drop_alpha",
            )
        if found != self.channels:
            raise FormatError(
                f"image {path} has {found} band(s)",
                f", data.channels is {self.channels}; set data.channels: {found} "
                "(and data.value_range unless files are 8-bit)",
                "data.channels",
            )
        return image


def _check_values(image: Array, scaled: Array, path: Path) -> None:
    """Refuse values that no network can take, before and after they were scaled to 0..255."""
    n_bad = int((~np.isfinite(image)).sum())
    if n_bad:
        raise DataError(
            f"image {path} has {n_bad} values that are not finite; put numbers in their place"
        )
    outside = np.abs(scaled) > _FAR_OUTSIDE
    if outside.any():
        raise DataError(
            f"image {path} has {outside.sum()} values far outside data.value_range, such as "
            f"{image[outside][0]:g} (a mark of no data?); put numbers of the range in their place"
        )


def read_image(path: Path, image_format: ImageFormat | None = None) -> Pixels:
    """Read an image, turned as its EXIF orientation says.

    Args:
        path: The file.
        image_format: What the file should hold; 8-bit RGB when left out.

    Returns:
        (H, W, channels): uint8, or float32 in 0..255 where the format has a value range.

    Raises:
        DataError: If the file cannot be read, is cut short, or holds something else.
    """
    return (image_format or ImageFormat()).convert(decode_image(path), path)


def decode_image(path: Path) -> Array:
    """Decode a file as stored, (H, W) or (H, W, C) in RGB order; 8-bit JPEG always as RGB.

    Raises:
        DataError: If the file cannot be read or is cut short.
    """
    suffix = path.suffix.lower()
    if suffix in TIFF_SUFFIXES:
        return _decode_tiff(path)
    if suffix == ".npy":
        return read_npy(path)
    import cv2

    content = _read_bytes(path)
    _check_complete(path, content)
    if _has_transparent_colors(content):
        return _decode_with_alpha(path)
    # JPEG: 8-bit colours, turned as EXIF says; others may be deep, and have alpha
    flags = cv2.IMREAD_COLOR_RGB if content[:2] == _JPEG else _flags_of(content)
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error as error:  # a header that asks for more pixels than OpenCV allows
        raise DataError(
            f"cannot decode image {path}: {' '.join(str(error).split())}; save it as TIFF or NPY"
        ) from error
    if image is None:
        raise UnreadableError(
            f"cannot decode image {path} ({len(content)} bytes); replace it or leave it out"
        )
    if flags == cv2.IMREAD_UNCHANGED and image.ndim == 3:
        order = [2, 1, 0, 3] if image.shape[2] == 4 else [2, 1, 0]
        return np.ascontiguousarray(image[..., order])
    return np.asarray(image)


def _flags_of(content: bytes) -> int:
    """Plain 8-bit RGB, grey and palette PNG take OpenCV's faster way."""
    import cv2

    is_plain_png = content[:4] == _PNG and content[24:25] <= b"\x08" and content[25] in (0, 2, 3)
    if is_plain_png:
        return cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.IMREAD_UNCHANGED


def _has_transparent_colors(content: bytes) -> bool:
    """Whether an 8-bit PNG says which of its colours are transparent; OpenCV would pass over it."""
    head = content[: content.find(b"IDAT")] if content[:4] == _PNG else b""
    return b"tRNS" in head and content[24:25] <= b"\x08"


def _decode_with_alpha(path: Path) -> Array:
    from PIL import Image

    try:
        with Image.open(path) as file:
            return np.asarray(file.convert("RGBA"))
    except (*_PIL_ERRORS, Image.DecompressionBombError) as error:
        raise UnreadableError(f"cannot decode image {path}: {error}; replace the file") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"cannot read image {path}: {error.strerror}") from error


def _decode_tiff(path: Path) -> Array:
    """Read the first image of a TIFF file as (H, W) or (H, W, C)."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            axes, array = series.axes, series.asarray()
            n_pictures = sum(map(_is_picture, file.series))
    except Exception as error:  # tifffile raises whatever the broken bytes lead it to
        raise UnreadableError(f"cannot decode {path}: {error}; replace the file") from error
    if n_pictures > 1:
        raise DataError(
            f"{path} holds {n_pictures} pictures of different sizes or kinds; write one per file"
        )
    if axes not in _AXES:
        raise DataError(
            f"{path} has the axes {axes} {array.shape}; write one image of bands per file"
        )
    return np.ascontiguousarray(array.transpose(_AXES[axes]))


def _is_picture(series: Any) -> bool:
    """Whether a series is a picture of its own: no smaller copy of another, no mask of it."""
    page = series.keyframe
    return not (page.is_reduced or page.is_mask)


def read_npy(path: Path) -> Array:
    """Read an array (H, W) or (H, W, C).

    Raises:
        DataError: If it cannot be read or has another number of axes.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UnreadableError(f"cannot read {path}: {error}; replace the file") from error
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise DataError(f"{path} has shape {array.shape}; save (H, W) or (H, W, C)")
    if array.dtype.kind not in "buif":
        raise DataError(f"{path} holds {array.dtype} values; save numbers, such as uint8")
    return np.asarray(array)


def read_shape(path: Path) -> Shape:
    """Return height and width from the file's header, turned as EXIF says.

    Raises:
        DataError: If there is no readable header.
    """
    if path.suffix == ".mat":  # SBD's labels have no header of their own
        from seglab.data.sources.masks import read_mask

        height, width = read_mask(path).shape[:2]
        return height, width
    try:
        return _read_header(path)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        raise UnreadableError(
            f"cannot read the header of {path}: {error}; replace the file"
        ) from error


def _read_header(path: Path) -> Shape:
    if path.suffix.lower() == ".npy":
        height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
        return int(height), int(width)
    if path.suffix.lower() in TIFF_SUFFIXES:
        import tifffile

        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            sizes = dict(zip(series.axes, series.shape, strict=True))
        return int(sizes["Y"]), int(sizes["X"])
    from PIL import Image

    with Image.open(path) as file:
        is_turned = file.format == "JPEG" and file.getexif().get(_ORIENTATION, 1) >= 5
        return (file.width, file.height) if is_turned else (file.height, file.width)


def has_orientation(path: Path) -> bool:
    """Tell whether a photograph is stored turned or mirrored, by its EXIF orientation."""
    if path.suffix.lower() not in (".jpg", ".jpeg"):
        return False
    from PIL import Image

    try:
        with Image.open(path) as file:
            return bool(file.getexif().get(_ORIENTATION, 1) != 1)
    except (OSError, SyntaxError, ValueError):
        return False  # said elsewhere


def _check_complete(path: Path, content: bytes) -> None:
    """Decoders fill what is missing from a cut file with grey and only print a warning."""
    trailer = _TRAILERS.get(content[:2])
    if trailer is None or trailer in content[-64:]:
        return
    from PIL import Image

    try:  # some cameras append data, so the last word is a strict decoder's
        with Image.open(path) as file:
            file.load()
    except (*_PIL_ERRORS, Image.DecompressionBombError) as error:
        raise UnreadableError(
            f"image {path} is cut short ({len(content)} bytes): {error}; replace the file"
        ) from error


def _wrong_depth(image: Array, path: Path) -> FormatError:
    numbers = image[np.isfinite(image)]
    if not numbers.size:
        return FormatError(f"image {path} holds no finite number: replace the file")
    low, high = float(numbers.min()), float(numbers.max())
    limit = 65535 if image.dtype == np.uint16 else high
    return FormatError(
        f"image {path} holds {image.dtype} values in {low:g}..{high:g}, not 8-bit ones",
        f"; say which values are black and white, for instance data.value_range: [0, {limit:g}]",
        "data.value_range",
    )
