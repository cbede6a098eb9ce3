"""Folders as people have them that no layout foresees: read right, or refused with the cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from seglab.data.errors import DataError
from seglab.data.inspection.guess import Guess, guess_folder
from seglab.data.sources.masks import read_mask
from seglab.data.sources.reading import decode_image

SHAPE = (24, 32)
MASK = np.zeros(SHAPE, np.uint8)
MASK[:, 10:20], MASK[:, 20:] = 1, 2
IMAGE = np.random.default_rng(0).integers(0, 255, (*SHAPE, 3)).astype(np.uint8)


def write(path: Path, array: Any = IMAGE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def write_pairs(root: Path, image: str, mask: str, n: int = 6, array: Any = MASK) -> None:
    """Pairs whose paths have the number in the place of #."""
    for number in range(n):
        write(root / image.replace("#", str(number)))
        write(root / mask.replace("#", str(number)), array)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/#.JPG", "masks/#.PNG"),
        ("images/#.JPEG", "masks/#.TIF"),
        ("Images/#.png", "Masks/#.png"),
        ("train/Images/#.png", "train/Labels/#.png"),
        ("#.jpg", "#_mask.png"),
        ("#.png", "#_Mask.PNG"),
        ("a/#.png", "a/#_mask.png"),
    ],
)
def test_capitals_in_names_are_no_obstacle(tmp_path: Path, image: str, mask: str) -> None:
    write_pairs(tmp_path, image, mask)
    guess = guess_folder(tmp_path)
    assert (guess.n_images, len(guess.class_names)) == (6, 3)


def test_capital_splits_are_to_be_renamed(tmp_path: Path) -> None:
    write_pairs(tmp_path, "Train/images/#.png", "Train/masks/#.png")
    with pytest.raises(DataError, match=r"in small letters: rename .*/Train to train"):
        guess_folder(tmp_path)


def test_only_validation_images_are_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, "val/images/#.png", "val/masks/#.png")
    with pytest.raises(DataError, match=r"there is .*/val and no folder train"):
        guess_folder(tmp_path)


def test_test_images_as_validation_are_told(tmp_path: Path) -> None:
    write_pairs(tmp_path, "train/images/#.png", "train/masks/#.png")
    write_pairs(tmp_path, "test/images/t#.png", "test/masks/t#.png")
    guess = guess_folder(tmp_path)
    assert guess.arguments["val_split"] == "test"
    assert "no val: the images of test are used for validation" in guess.remarks


@pytest.mark.parametrize("end", ["", ".png"])
def test_names_with_blanks_may_stand_in_lists(tmp_path: Path, end: str) -> None:
    write_pairs(tmp_path, "images/street #.png", "masks/street #.png")
    (tmp_path / "train.txt").write_text("".join(f"street {n}{end}\n" for n in range(4)))
    (tmp_path / "val.txt").write_text(f"street 4{end}\nstreet 5{end}\n")
    guess = guess_folder(tmp_path)
    assert guess.arguments["list"] == f"{tmp_path}/{{split}}.txt"
    assert guess.n_images == 6


def test_pairs_with_blanks_need_commas(tmp_path: Path) -> None:
    from seglab.data.sources.layouts import read_list

    write_pairs(tmp_path, "images/street #.png", "masks/street #.png", 1)
    (tmp_path / "a.txt").write_text("images/street 0.png masks/street 0.png\n")
    with pytest.raises(DataError, match="put commas between names with blanks"):
        read_list(tmp_path, tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("images/street 0.png,masks/street 0.png\n")
    assert len(read_list(tmp_path, tmp_path / "a.txt")) == 1


def write_tiff(path: Path, *pictures: tuple[Any, int]) -> None:
    with tifffile.TiffWriter(path) as file:
        for array, kind in pictures:
            file.write(array, subfiletype=kind)


def test_tiff_of_several_pictures_is_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "two.tif", (MASK, 0), (MASK[:10], 0))
    for read in (decode_image, read_mask):
        with pytest.raises(DataError, match=r"two.tif holds 2 pictures .* write one per file"):
            read(tmp_path / "two.tif")
    write_tiff(tmp_path / "copy.tif", (MASK, 0), (MASK[::2, ::2], 1), (MASK > 0, 4))
    np.testing.assert_array_equal(decode_image(tmp_path / "copy.tif"), MASK)


def test_grey_masks_in_three_channels_keep_their_order(tmp_path: Path) -> None:
    uneven = np.full(SHAPE, 2, np.uint8)
    uneven[0], uneven[1:4], uneven[4:8] = 0, 1, 255
    write_pairs(tmp_path, "images/#.png", "masks/#.png", array=np.repeat(uneven[..., None], 3, 2))
    guess = guess_folder(tmp_path)
    assert guess.class_names == ["class_0", "class_1", "class_2"]
    white = guess.arguments["colors"].pop("ignore")
    assert white == [255, 255, 255]
    assert [*guess.arguments["colors"].values()] == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


def test_labels_in_the_transparency_alone_are_refused(tmp_path: Path) -> None:
    rgba = np.zeros((*SHAPE, 4), np.uint8)
    rgba[..., 3] = MASK * 100
    write(tmp_path / "a.png", rgba)
    with pytest.raises(DataError, match="differs in its transparency alone"):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_jpeg_masks_are_refused_with_the_reason(tmp_path: Path, folder: str) -> None:
    write_pairs(tmp_path, "images/#.jpg", "masks/#.jpg")
    with pytest.raises(DataError, match=r"of a kind that cannot hold class ids.* as PNG"):
        guess_folder(tmp_path)


def test_pictures_that_are_not_read_are_named(tmp_path: Path) -> None:
    write_pairs(tmp_path, "images/#.gif", "masks/#.png")
    with pytest.raises(DataError, match=r"6 \.gif files are not read: save them as PNG"):
        guess_folder(tmp_path)


@pytest.mark.parametrize("made", ["nothing", "images", "empty masks"])
def test_folders_without_masks_say_what_they_hold(tmp_path: Path, made: str) -> None:
    if made != "nothing":
        write_pairs(tmp_path, "images/#.png", "images/#.png", array=IMAGE)
    if made == "empty masks":
        (tmp_path / "masks").mkdir()
    with pytest.raises(DataError, match=r"holds nothing|it holds 6 images/"):
        guess_folder(tmp_path)


def test_polygons_of_the_second_split_are_to_be_drawn(
    tmp_path: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"label": "car", "points": [[1, 1], [20, 1], [20, 20]], "shape_type": "polygon"}
    for split in ("train", "val"):
        for number in range(3):
            image = tmp_path / f"set/{split}/images/{split}{number}.png"
            write(image)
            content = {"shapes": [shape], "imagePath": image.name}
            image.with_suffix(".json").write_text(json.dumps(content))
    root = tmp_path / "set"
    run("prepare", "labelme", root / "train/images", "--output", root / "train/masks")
    with pytest.raises(SystemExit):
        run("init", root, "--output", tmp_path / "a.yaml")
    said = capsys.readouterr().err
    typed = said.rpartition("draw them first: ")[2].split()
    assert typed[-2:] == ["--classes", "background,car"]
    run(*typed[typed.index("prepare") :])
    run("init", root, "--output", tmp_path / "a.yaml")
    assert "class_names: [background, car]" in (tmp_path / "a.yaml").read_text()


def test_images_that_are_links_are_drawn(tmp_path: Path, run: Callable[..., None]) -> None:
    write(tmp_path / "elsewhere/a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").symlink_to(tmp_path / "elsewhere/a.png")
    shape = {"label": "car", "points": [[1, 1], [20, 1], [20, 20]], "shape_type": "polygon"}
    content = {"shapes": [shape], "imagePath": "a.png"}
    (tmp_path / "images/a.json").write_text(json.dumps(content))
    run("prepare", "labelme", tmp_path / "images", "--output", tmp_path / "masks")
    assert set(np.unique(read_mask(tmp_path / "masks/a.png"))) == {0, 1}
    content["imagePath"] = "../elsewhere/a.png"
    (tmp_path / "images/a.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        run("prepare", "labelme", tmp_path / "images", "--output", tmp_path / "others")


def test_guess_of_a_plain_folder_says_nothing_more(tmp_path: Path) -> None:
    write_pairs(tmp_path, "train/images/#.png", "train/masks/#.png")
    write_pairs(tmp_path, "val/images/v#.png", "val/masks/v#.png")
    guess: Guess = guess_folder(tmp_path)
    assert len(guess.remarks) == 2  # names to be replaced, shares
