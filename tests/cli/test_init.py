"""`init` writes a config for a folder as it lies there, and the config trains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from seglab.cli.init import write_config
from seglab.data import DataError, FolderDataModule

RNG = np.random.default_rng(0)
COLORS = np.uint8([[128, 64, 128], [0, 0, 142], [9, 8, 7]])


def save_pair(image: Path, mask: Path, ids: np.ndarray | None = None) -> None:
    image.parent.mkdir(parents=True, exist_ok=True)
    mask.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (48, 64, 3)).astype(np.uint8)).save(image)
    ids = np.resize(np.uint8([0, 1, 2]), (48, 64)) if ids is None else ids
    Image.fromarray(ids).save(mask)


def written(root: Path) -> FolderDataModule:
    path = root.with_suffix(".yaml")
    write_config(root, path)
    section = yaml.safe_load(path.read_text())["data"]
    assert section["class_path"] == "seglab.data.FolderDataModule"
    data = FolderDataModule(**section["init_args"] | {"num_workers": 0})
    data.setup("fit")
    return data


def test_splits_with_folders(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        for n in range(3):
            save_pair(tmp_path / f"d/{split}/img/{n}.jpg", tmp_path / f"d/{split}/labels/{n}.png")
    data = written(tmp_path / "d")
    assert (len(data.train_dataset), len(data.val_dataset)) == (3, 3)
    assert data.class_names == ("class_0", "class_1", "class_2")
    assert data.crop_size == [32, 64]


def test_folders_with_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for n in range(2):
            save_pair(
                tmp_path / f"d/images/{split}/x/{n}.png", tmp_path / f"d/gt/{split}/x/{n}_gt.png"
            )
    data = written(tmp_path / "d")
    assert (len(data.train_dataset), len(data.val_dataset)) == (2, 2)


def test_no_validation_images_beside_each_other(tmp_path: Path) -> None:
    for n in range(30):
        save_pair(tmp_path / f"d/{n}.jpg", tmp_path / f"d/{n}_mask.png")
    data = written(tmp_path / "d")
    assert len(data.train_dataset) + len(data.val_dataset) == 30
    assert 1 <= len(data.val_dataset) <= 15


def test_binary_masks_of_0_and_255(tmp_path: Path) -> None:
    ids = np.resize(np.uint8([0, 255, 255]), (48, 64))
    for n in range(20):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png", ids)
    data = written(tmp_path / "d")
    assert data.class_names == ("background", "foreground")
    assert set(np.unique(data.train_dataset[0]["mask"])) - {255} == {0, 1}  # 255: padding


def test_colours_and_high_ids(tmp_path: Path) -> None:
    for n in range(20):
        picture = COLORS[np.resize([0, 1, 1, 2, 1, 0], (48, 64))]
        save_pair(tmp_path / f"c/images/{n}.png", tmp_path / f"c/masks/{n}.png", picture)
        ids = np.resize(np.uint16([7, 24001, 300]), (48, 64))
        save_pair(tmp_path / f"i/images/{n}.png", tmp_path / f"i/masks/{n}.png", ids)
    colored = written(tmp_path / "c")
    assert colored.palette[0] == (0, 0, 142)  # the commonest first
    assert written(tmp_path / "i").num_classes == 3


def test_folder_without_pairs_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "something").mkdir()
    with pytest.raises(DataError, match=r"no layout fits .* holds something/"):
        write_config(tmp_path, tmp_path / "a.yaml")


def test_config_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("mine")
    with pytest.raises(FileExistsError, match="--output"):
        write_config(tmp_path, tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text() == "mine"


def test_test_images_without_masks_are_left_alone(tmp_path: Path) -> None:
    for n in range(20):
        save_pair(tmp_path / f"d/train/images/{n}.png", tmp_path / f"d/train/masks/{n}.png")
    save_pair(tmp_path / "d/test/images/1.png", tmp_path / "elsewhere.png")
    data = written(tmp_path / "d")
    assert len(data.train_dataset) + len(data.val_dataset) == 20


def test_broken_validation_is_not_passed_over(tmp_path: Path) -> None:
    save_pair(tmp_path / "d/train/images/1.png", tmp_path / "d/train/masks/1.png")
    save_pair(tmp_path / "d/val/images/2.png", tmp_path / "elsewhere.png")
    with pytest.raises(DataError, match=r"1 image\(s\) have no mask: .*val/images/2.png"):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


def test_nearest_layout_is_named(tmp_path: Path) -> None:
    for n in range(3):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png")
    (tmp_path / "d/masks/1.png").unlink()
    with pytest.raises(DataError, match=r"images/\*\*/\*, .* 1 image\(s\) have no mask: .*1.png"):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


def test_several_lists_are_not_guessed_at(tmp_path: Path) -> None:
    save_pair(tmp_path / "d/i/1.png", tmp_path / "d/m/1.png")
    for name in ("train.txt", "val.txt"):
        (tmp_path / "d" / name).write_text("i/1.png m/1.png")
    with pytest.raises(DataError, match=r"several lists .*third column of train and val"):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda n: np.full((48, 64), 7, np.uint8), r"hold one value \(7\) besides 255"),
        (lambda n: np.arange(3072).reshape(48, 64).clip(0, 255).astype(np.uint8), "smoothed"),
        (lambda n: COLORS[np.zeros((48, 64), int)] if n else np.eye(48, 64, dtype="u1"), "one way"),
    ],
)
def test_masks_that_teach_nothing_are_refused(tmp_path: Path, masks: Any, message: str) -> None:
    for n in range(9):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png", masks(n))
    with pytest.raises(DataError, match=message):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


def test_images_of_several_depths_are_refused(tmp_path: Path) -> None:
    for n in range(9):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png")
    Image.fromarray(np.full((48, 64), 40000, np.uint16)).save(tmp_path / "d/images/3.png")
    with pytest.raises(DataError, match=r"is 8-bit, so nearly black in data.value_range"):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


def test_raw_values_that_the_config_does_not_list_are_refused(tmp_path: Path) -> None:
    ids = np.resize(np.uint8([0, 5, 9]), (48, 64))
    for n in range(20):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png", ids)
    assert len(written(tmp_path / "d").class_names) == 3
    path = tmp_path / "d/masks/1.png"
    Image.fromarray(np.where(ids == 9, 2, ids).astype(np.uint8)).save(path)  # 2 is no id here
    section = yaml.safe_load((tmp_path / "d.yaml").read_text())["data"]["init_args"]
    data = FolderDataModule(**section)
    source = data.open_source("train")
    names = [source.name(index) for index in range(len(source))]
    source = source if "1" in names else data.open_source("val")
    index = [source.name(index) for index in range(len(source))].index("1")
    with pytest.raises(DataError, match=r"value 2 \(1024 pixels\); allowed are 0, 5, 9, 255"):
        source.read(index)


def test_marks_of_no_data_do_not_flatten_the_rest(tmp_path: Path) -> None:
    for n in range(9):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png")
        (tmp_path / f"d/images/{n}.png").unlink()
        raw = RNG.random((48, 64, 3)).astype(np.float32)
        raw[0, 0, 1] = np.finfo(np.float32).min
        np.save(tmp_path / f"d/images/{n}.npy", raw)
    with pytest.raises(DataError, match=r"1 values far outside .*-3.40282e\+38 \(a mark"):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


def test_images_in_no_pair_are_told(tmp_path: Path) -> None:
    for n in range(9):
        save_pair(tmp_path / f"d/{n}.jpg", tmp_path / f"d/{n}.png")
    save_pair(tmp_path / "d/other/overview.bmp", tmp_path / "elsewhere.png")
    written(tmp_path / "d")
    assert (
        "# - 1 image file(s) are in no pair: other/overview.bmp"
        in (tmp_path / "d.yaml").read_text()
    )
