"""Rectangles of files against the same cut from the whole array that was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from seglab.data.errors import DataError
from seglab.data.sources.reading import ImageFormat
from seglab.data.sources.regions import Regions

LAYOUTS = {
    "plain": {},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "one_strip": {"rowsperstrip": 45, "compression": "zlib"},
    "tiles": {"tile": (16, 32), "compression": "lzw"},
    "raw_tiles": {"tile": (16, 16)},
    "predictor": {"tile": (32, 16), "compression": "zlib", "predictor": True},
    "big_endian": {"tile": (16, 16), "byteorder": ">", "compression": "zlib"},
}
PARTS = [(0, 45, 0, 61), (0, 1, 0, 1), (44, 45, 60, 61), (13, 35, 29, 50), (16, 32, 32, 48)]


def agree(path: Path, array: np.ndarray, image_format: ImageFormat) -> None:
    regions = Regions(path, image_format)
    assert regions.shape == array.shape[:2]
    for top, bottom, left, right in PARTS:
        found = regions.read(slice(top, bottom), slice(left, right))
        np.testing.assert_array_equal(found, array[top:bottom, left:right])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("apart", [False, True])
def test_every_tiff_layout_gives_its_pixels(layout: str, apart: bool, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (45, 61, 3)).astype(np.uint8)
    stored = array.transpose(2, 0, 1) if apart else array
    kind = {"photometric": "rgb", "planarconfig": "separate" if apart else "contig"}
    tifffile.imwrite(tmp_path / "a.tif", stored, **kind, **LAYOUTS[layout])
    agree(tmp_path / "a.tif", array, ImageFormat())


def test_deep_bands_are_scaled_as_in_training(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 5000, (45, 61, 5)).astype(np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif", array, tile=(16, 16), photometric="minisblack", planarconfig="contig"
    )
    np.save(tmp_path / "a.npy", array)
    expected = array.astype(np.float32) * np.float32(255 / 5000)
    for name in ("a.tif", "a.npy"):
        agree(tmp_path / name, expected, ImageFormat(5, (0, 5000)))


def test_other_formats_are_read_whole(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (45, 61, 3)).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    agree(tmp_path / "a.png", array, ImageFormat())


def test_jpeg_tiles_use_their_shared_tables(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    array = np.dstack([ramp, ramp.T, ramp])
    tifffile.imwrite(tmp_path / "a.tif", array, tile=(16, 16), compression="jpeg")
    whole = tifffile.imread(tmp_path / "a.tif")
    found = Regions(tmp_path / "a.tif", ImageFormat()).read(slice(5, 40), slice(17, 60))
    np.testing.assert_array_equal(found, whole[5:40, 17:60])


def test_damaged_tiles_are_told_in_a_sentence(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, tile=(16, 16), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[5]
    content = bytearray(path.read_bytes())
    content[offset : offset + 200] = bytes(200)
    path.write_bytes(content)
    regions = Regions(path, ImageFormat())
    with pytest.raises(DataError, match=r"cannot decode .*a\.tif"):
        regions.read(slice(0, 64), slice(0, 64))
    path.write_bytes(b"II*")
    with pytest.raises(DataError, match=r"cannot decode .*a\.tif"):
        Regions(path, ImageFormat())
