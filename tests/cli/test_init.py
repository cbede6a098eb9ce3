"""`init` writes a config for a folder as it lies there, and the config trains."""

from pathlib import Path

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
