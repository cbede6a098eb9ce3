"""Read rectangles of large image files without decoding the rest.

TIFF files are read tile by tile (or strip by strip), NPY files are mapped; other formats have no
parts and are decoded whole, as 8-bit pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seglab.data.errors import DataError
from seglab.data.sources.reading import TIFF_SUFFIXES, Array, ImageFormat, decode_image
from seglab.data.sources.source import Pixels, Shape

_PLANES = {"YX": False, "YXS": False, "SYX": True}  # axes of a page: whether bands lie apart


class Regions:
    """An image of which rectangles can be read.

    Args:
        path: The file.
        image_format: What it holds, see `ImageFormat.convert`.

    Raises:
        DataError: The file cannot be read.
    """

    def __init__(self, path: Path, image_format: ImageFormat) -> None:
        self.path = path
        self.image_format = image_format
        is_tiff = path.suffix.lower() in TIFF_SUFFIXES
        opened = (_open_tiff(path) if is_tiff else None) or _open_array(path)
        self._content: _Page | _Whole = opened
        self.shape: Shape = opened.shape

    def read(self, rows: slice, columns: slice) -> Pixels:
        """Return the pixels of a rectangle, (h, w, channels), as `read_image` does.

        Raises:
            DataError: A part of the file is damaged, or holds something else.
        """
        return self.image_format.convert(self._content.read(rows, columns), self.path)


class _Whole(NamedTuple):
    """An array in memory, or a file's mapped into it."""

    array: Array

    @property
    def shape(self) -> Shape:
        return self.array.shape[0], self.array.shape[1]

    def read(self, rows: slice, columns: slice) -> Array:
        return np.asarray(self.array[rows, columns])


class _Page(NamedTuple):
    """The first page of a TIFF file, and how its segments (tiles or strips) lie."""

    path: Path
    page: Any
    decode: Any
    shape: Shape
    segment: Shape
    bands: int
    bands_lie_apart: bool

    def read(self, rows: slice, columns: slice) -> Array:
        out = np.zeros(
            (rows.stop - rows.start, columns.stop - columns.start, self.bands), self.page.dtype
        )
        import tifffile

        try:
            with tifffile.FileHandle(self.path) as file:
                for index, top, left, band in self._segments(rows, columns):
                    self._copy(file, index, (top - rows.start, left - columns.start), band, out)
        except (OSError, ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
            raise DataError(f"cannot decode {self.path}: {error}; replace the file") from error
        return out

    def _segments(self, rows: slice, columns: slice) -> Iterator[tuple[int, int, int, int]]:
        """Number, top, left and band of the segments that a rectangle touches."""
        height, width = self.segment
        n_down, n_across = -(-self.shape[0] // height), -(-self.shape[1] // width)
        for band in range(self.bands if self.bands_lie_apart else 1):
            for y in range(rows.start // height, -(-rows.stop // height)):
                for x in range(columns.start // width, -(-columns.stop // width)):
                    yield (band * n_down + y) * n_across + x, y * height, x * width, band

    def _copy(self, file: Any, index: int, place: Shape, band: int, out: Array) -> None:
        """Decode one segment and copy its part that lies in `out`; `place` is its corner there."""
        page = self.page
        n_bytes = page.databytecounts[index]
        if n_bytes == 0:
            return  # left out by the writer: zeros
        file.seek(page.dataoffsets[index])
        content = file.read(n_bytes)
        if len(content) < n_bytes:
            raise ValueError(f"it is cut short in segment {index}")
        segment = self.decode(content, index, jpegtables=page.jpegtables)[0]
        (top, left), (height, width) = place, segment.shape[1:3]
        inside = out[max(top, 0) : top + height, max(left, 0) : left + width]
        y, x = max(-top, 0), max(-left, 0)
        part = segment[0, y : y + inside.shape[0], x : x + inside.shape[1]]
        inside[: part.shape[0], : part.shape[1], band : band + part.shape[2]] = part


def _open_tiff(path: Path) -> _Page | _Whole | None:
    """Open a TIFF file; None where its layout has no parts or is one that only whole reading knows.

    Raises:
        DataError: It is no TIFF file.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            page: Any = series.pages[0]
            if len(series.pages) != 1 or page.axes not in _PLANES:
                return None
            if page.is_memmappable:
                mapped = tifffile.memmap(path, mode="r")
                return _Whole(mapped.transpose(1, 2, 0) if _PLANES[page.axes] else mapped)
            return _segmented(path, page)
    except Exception as error:  # tifffile raises whatever the broken bytes lead it to
        raise DataError(f"cannot decode {path}: {error}; replace the file") from error


def _segmented(path: Path, page: Any) -> _Page | None:
    if len(page.dataoffsets) < 2:
        return None
    shape = page.imagelength, page.imagewidth
    strip = min(page.rowsperstrip, shape[0]), shape[1]
    segment = (page.tilelength, page.tilewidth) if page.is_tiled else strip
    decode = page.decode  # made from the open file
    return _Page(path, page, decode, shape, segment, page.samplesperpixel, _PLANES[page.axes])


def _open_array(path: Path) -> _Whole:
    if path.suffix.lower() != ".npy":
        return _Whole(decode_image(path))
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}; replace the file") from error
    if array.ndim not in (2, 3):
        raise DataError(f"{path} has shape {array.shape}; save (H, W) or (H, W, C)")
    return _Whole(array)
