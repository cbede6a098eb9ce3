"""Images of any depth and number of bands arrive whole, or are refused with the cure."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from seglab.data import DataError
from seglab.data.sources.reading import ImageFormat, read_image, read_shape

RNG = np.random.default_rng(0)


def deep(channels: int) -> np.ndarray:
    shape = (20, 30) if channels == 1 else (20, 30, channels)
    return RNG.integers(0, 65536, shape).astype(np.uint16)


def scaled(raw: np.ndarray, low: float, high: float) -> np.ndarray:
    return (raw.astype(np.float64) - low) * 255 / (high - low)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"compression": "lzw", "predictor": True},
        {"tile": (16, 16)},
        {"planarconfig": "separate"},
    ],
)
def test_deep_tiff_keeps_every_value(tmp_path: Path, channels: int, options: Any) -> None:
    raw, path = deep(channels), tmp_path / "a.tif"
    stored = raw
    if options.get("planarconfig") == "separate" and channels > 1:
        stored = np.ascontiguousarray(np.moveaxis(raw, 2, 0))
        tifffile.imwrite(path, stored, photometric="minisblack", planarconfig="separate")
    else:
        interleaved = {"planarconfig": "contig"} if channels > 1 else {"planarconfig": None}
        tifffile.imwrite(path, stored, photometric="minisblack", **options | interleaved)
    image = read_image(path, ImageFormat(channels, (0, 65535)))
    expected = scaled(raw if channels > 1 else raw[..., None], 0, 65535)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, expected, atol=1e-4)
    assert read_shape(path) == (20, 30)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_png_keeps_values_and_order_of_bands(tmp_path: Path, channels: int) -> None:
    raw, path = deep(channels), tmp_path / "a.png"
    order = [2, 1, 0, 3][:channels] if channels == 4 else [2, 1, 0]
    cv2.imwrite(str(path), raw if channels == 1 else np.ascontiguousarray(raw[..., order]))
    image = read_image(path, ImageFormat(channels, (100, 4100)))
    expected = scaled(raw if channels > 1 else raw[..., None], 100, 4100)
    np.testing.assert_allclose(image, expected, rtol=1e-6, atol=1e-3)


def test_npy_of_fractions_is_scaled(tmp_path: Path) -> None:
    raw = RNG.random((20, 30, 6)).astype(np.float32)
    np.save(tmp_path / "a.npy", raw)
    image = read_image(tmp_path / "a.npy", ImageFormat(6, (0, 1)))
    np.testing.assert_allclose(image, raw * 255, rtol=1e-6)
    assert read_shape(tmp_path / "a.npy") == (20, 30)


def test_deep_image_without_a_range_is_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.uint16([[5, 4000], [7, 90]]))
    with pytest.raises(DataError, match=r"uint16 values in 5..4000, .*value_range: \[0, 65535\]"):
        read_image(tmp_path / "a.png")


def test_number_of_bands_must_be_stated(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", deep(5), photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match=r"has 5 band\(s\), data.channels is 3; .*channels: 5"):
        read_image(tmp_path / "a.tif", ImageFormat(3, (0, 1)))
    with pytest.raises(DataError, match=r"has 5 band\(s\), data.channels is 4"):
        read_image(tmp_path / "a.tif", ImageFormat(4, (0, 1)))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    raw = np.zeros((4, 4, 3), np.float32)
    raw[1, 2] = np.nan
    np.save(tmp_path / "a.npy", raw)
    with pytest.raises(DataError, match=r"3 values that are not finite"):
        read_image(tmp_path / "a.npy", ImageFormat(3, (0, 1)))


def test_opaque_alpha_goes_and_other_alpha_is_refused(tmp_path: Path) -> None:
    rgba = RNG.integers(0, 256, (8, 9, 4)).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"fourth band that is not opaque.*data.channels: 4"):
        read_image(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", ImageFormat(4)) == rgba).all()
    dropped = read_image(tmp_path / "a.png", ImageFormat(drop_alpha=True))
    assert (dropped == rgba[..., :3]).all()
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "b.png")
    assert (read_image(tmp_path / "b.png") == rgba[..., :3]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_viewers_show_them(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    yy, xx = np.mgrid[:48, :64]
    picture = np.stack([yy * 5, xx * 4, (yy + xx) * 2], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=98)
    with Image.open(tmp_path / "a.jpg") as file:
        expected = np.array(ImageOps.exif_transpose(file))
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).max() <= 3  # decoders differ
    assert read_shape(tmp_path / "a.jpg") == expected.shape[:2]


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_grey_and_palette_images_become_rgb(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(RNG.integers(0, 256, (8, 9, 3)).astype(np.uint8)).convert(mode)
    picture.save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == np.array(picture.convert("RGB"))).all()


@pytest.mark.parametrize("suffix", [".tif", ".npy", ".png", ".jpg"])
def test_broken_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"II*\x00nothing" if suffix == ".tif" else b"nothing at all")
    with pytest.raises(DataError, match=rf"broken\{suffix}"):
        read_image(path)
    with pytest.raises(DataError, match=rf"broken\{suffix}"):
        read_shape(path)
