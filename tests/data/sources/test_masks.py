"""Masks of every kind become the same class ids."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from seglab.data.errors import DataError, LabelValueError
from seglab.data.sources.labels import ColorTable, LabelTable
from seglab.data.sources.masks import read_mask

IDS = np.random.default_rng(0).integers(0, 3, (12, 17)).astype(np.uint8)
COLORS = np.uint8([[128, 64, 128], [0, 0, 142], [255, 255, 0]])
NAMES = ["road", "car", "sign"]


def as_grey(path: Path) -> None:
    Image.fromarray(IDS).save(path.with_suffix(".png"))


def as_palette(path: Path) -> None:
    picture = Image.fromarray(IDS).convert("P")
    picture.putpalette(COLORS.ravel().tolist())
    picture.putdata(IDS.ravel().tolist())
    picture.save(path.with_suffix(".png"))


def as_16_bit(path: Path) -> None:
    Image.fromarray(IDS.astype(np.uint16)).save(path.with_suffix(".png"))


def as_tiff(path: Path) -> None:
    tifffile.imwrite(path.with_suffix(".tif"), IDS.astype(np.uint16), compression="zlib")


def as_npy(path: Path) -> None:
    np.save(path.with_suffix(".npy"), IDS.astype(np.int64))


def as_npy_of_whole_floats(path: Path) -> None:
    np.save(path.with_suffix(".npy"), IDS.astype(np.float32)[..., None])


@pytest.mark.parametrize(
    "save", [as_grey, as_palette, as_16_bit, as_tiff, as_npy, as_npy_of_whole_floats]
)
def test_ids_arrive_whatever_the_file(tmp_path: Path, save: object) -> None:
    save(tmp_path / "mask")  # type: ignore[operator]
    (path,) = tmp_path.iterdir()
    assert (LabelTable(3)(read_mask(path), path) == IDS).all()


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_become_ids(tmp_path: Path, alpha: bool) -> None:
    picture = COLORS[IDS]
    if alpha:
        picture = np.dstack([picture, np.full(IDS.shape, 255, np.uint8)])
    path = tmp_path / "mask.png"
    Image.fromarray(picture).save(path)
    table = ColorTable(NAMES, {n: c.tolist() for n, c in zip(NAMES, COLORS, strict=True)})
    assert (table(read_mask(path), path) == IDS).all()


def test_several_colours_of_a_class_and_ignored_ones() -> None:
    table = ColorTable(
        ["a", "b"], {"a": [[1, 2, 3], [4, 5, 6]], "b": [7, 8, 9], "ignore": [0, 0, 0]}
    )
    mask = np.uint8([[[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]]])
    assert table(mask, Path("a.png")).tolist() == [[0, 0, 1, 255]]


def test_colour_of_no_class_is_named_with_its_count() -> None:
    table = ColorTable(["a", "b"], {"a": [1, 2, 3], "b": [7, 8, 9]})
    mask = np.uint8([[[1, 2, 3], [3, 2, 1], [3, 2, 1]]])
    with pytest.raises(
        LabelValueError, match=r"a.png has colours of no class: \[3, 2, 1\] \(2 pix"
    ):
        table(mask, Path("a.png"))


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        ({"a": [1, 2, 3]}, r"missing \['b'\], unknown \[\]"),
        ({"a": [1, 2, 3], "b": [1, 2, 4], "c": [0, 0, 0]}, r"unknown \['c'\]"),
        ({"a": [1, 2, 3], "b": [1, 2, 3]}, r"gives \[1, 2, 3\] to two classes"),
        ({"a": [1, 2], "b": [1, 2, 3]}, r"\['a'\] = \[1, 2\]: a colour is three of 0..255"),
        ({"a": [1, 2, 300], "b": [1, 2, 3]}, r"a colour is three of 0..255"),
    ],
)
def test_contradicting_colours_are_refused(colors: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ColorTable(["a", "b"], colors)


def test_ids_above_255_need_the_map_and_then_arrive(tmp_path: Path) -> None:
    raw = np.array([[0, 24001, 700]], np.uint16)
    path = tmp_path / "mask.png"
    Image.fromarray(raw).save(path)
    with pytest.raises(LabelValueError, match=r"value 700 \(1 pixels\), value 24001 \(1 pixels\)"):
        LabelTable(2)(read_mask(path), path)
    mapped = LabelTable(2, {24001: 1, 700: 255})(read_mask(path), path)
    assert mapped.tolist() == [[0, 1, 255]]


def test_negative_and_huge_ids_are_refused_not_wrapped(tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.array([[0, -1, 65536, 2**31 + 1]]))
    with pytest.raises(LabelValueError, match=r"value -1 .*value 65536 .*value 2147483649"):
        LabelTable(2)(read_mask(tmp_path / "mask.npy"), tmp_path / "mask.npy")


def test_fractions_are_no_ids(tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.array([[0, 0.5]]))
    with pytest.raises(DataError, match="holds fractions"):
        read_mask(tmp_path / "mask.npy")
