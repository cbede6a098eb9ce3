"""`init` writes a config for a folder as it lies there, and the config trains."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from seglab.cli import main
from seglab.cli.init import write_config
from seglab.cli.polygons import init_arguments
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
    for name in ("first.txt", "second.txt"):
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


def names_of(data: FolderDataModule, split: str) -> list[str]:
    source = data.open_source(split)
    return [Path(source.name(index)).name for index in range(len(source))]


@pytest.mark.parametrize("place", ["", "ImageSets/Segmentation/"])
def test_lists_of_names_are_the_splits(tmp_path: Path, place: str) -> None:
    for n in range(9):
        save_pair(tmp_path / f"d/JPEGImages/b{n}.jpg", tmp_path / f"d/SegmentationClass/b{n}.png")
    (tmp_path / "d/SegmentationClass/b8.png").unlink()  # of an image in no list
    (tmp_path / "d" / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "d" / place / "train.txt").write_text("b5\nb1.jpg\nJPEGImages/b7\n")
    (tmp_path / "d" / place / "val.txt").write_text("b0\nb2\n")
    data = written(tmp_path / "d")
    assert names_of(data, "train") == ["b1", "b5", "b7"]
    assert names_of(data, "val") == ["b0", "b2"]
    assert "# - the splits are those of train.txt and val.txt" in (tmp_path / "d.yaml").read_text()


def test_lists_of_pairs_are_the_splits(tmp_path: Path) -> None:
    for n in range(4):
        save_pair(tmp_path / f"d/i/{n}.png", tmp_path / f"d/m/{n}.png")
    (tmp_path / "d/train.csv").write_text("image,mask\ni/0.png,m/0.png\ni/3.png,m/3.png")
    (tmp_path / "d/valid.csv").write_text("image,mask\ni/1.png,m/1.png")
    data = written(tmp_path / "d")
    assert (names_of(data, "train"), names_of(data, "val")) == (["0", "3"], ["1"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("b9", r"nearest .* 1 name\(s\) .*: b9;"), ("b1\nb1", "names 'b1' twice")],
)
def test_lists_that_fit_no_image_are_refused(tmp_path: Path, name: str, message: str) -> None:
    for n in range(4):
        save_pair(tmp_path / f"d/images/b{n}.png", tmp_path / f"d/masks/b{n}.png")
    (tmp_path / "d/train.txt").write_text(f"b0\n{name}\n")
    (tmp_path / "d/val.txt").write_text("b2")
    with pytest.raises(DataError, match=message):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


def test_lists_beside_folders_of_splits_are_told(tmp_path: Path) -> None:
    for split in ("train", "val"):
        name = f"of_{split}"
        save_pair(
            tmp_path / f"d/{split}/images/{name}.png", tmp_path / f"d/{split}/masks/{name}.png"
        )
        (tmp_path / f"d/{split}.txt").write_text(name)
    assert names_of(written(tmp_path / "d"), "train") == ["of_train"]
    assert "train.txt, val.txt beside the images" in (tmp_path / "d.yaml").read_text()


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_broken_files_are_told_and_passed_over(tmp_path: Path, kind: str) -> None:
    for n in range(20):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png")
    path = tmp_path / f"d/{kind}/7.png"
    path.write_bytes(path.read_bytes()[:60])
    guess = write_config(tmp_path / "d", tmp_path / "d.yaml")
    assert len(guess.class_names) == 3
    assert guess.remarks[0].startswith(f"1 file(s) cannot be read and stop a training: {path};")
    assert "# - 1 file(s) cannot be read" in (tmp_path / "d.yaml").read_text()


def test_all_files_broken_is_an_error(tmp_path: Path) -> None:
    for n in range(3):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png")
        (tmp_path / f"d/images/{n}.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"images/2.png"):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


@pytest.mark.parametrize("mask", ["masks/{}.jpg", "images/{}_mask.jpg"])
def test_masks_as_jpeg_are_named(tmp_path: Path, mask: str) -> None:
    for n in range(3):
        save_pair(tmp_path / f"d/images/{n}.jpg", tmp_path / "d" / mask.format(n))
    with pytest.raises(DataError, match=r"cannot hold class ids.*0(_mask)?\.jpg: save.* PNG"):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


def test_names_of_cityscapes_are_known(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for n in range(3):
            stem = f"{split}/seq/f{n}"
            own = f"own/{split}/labels/seq/f{n}"
            save_pair(
                tmp_path / f"own/{split}/images/seq/f{n}.png",
                Path(f"{tmp_path}/{own}_gtFine_labelIds.png"),
            )
            mask = tmp_path / f"city/gtFine/{stem}_gtFine_labelIds.png"
            save_pair(tmp_path / f"city/leftImg8bit/{stem}_leftImg8bit.png", mask)
            for kind in ("color", "instanceIds"):
                mask.with_name(f"f{n}_gtFine_{kind}.png").write_bytes(mask.read_bytes())
    for name in ("own", "city"):
        data = written(tmp_path / name)
        assert (len(data.train_dataset), len(data.val_dataset)) == (3, 3)
        assert names_of(data, "val")[0].startswith("f0")


def test_unknown_names_are_shortly_listed(tmp_path: Path) -> None:
    for n in range(3):
        save_pair(tmp_path / f"d/photos/p{n}.jpg", tmp_path / f"d/drawn/x{n}-q.png")
    with pytest.raises(
        DataError, match=r"3 drawn/\*\.png \(as x0-q\.png\), 3 photos/\*\.jpg"
    ) as told:
        write_config(tmp_path / "d", tmp_path / "a.yaml")
    assert len(str(told.value).replace(str(tmp_path), "")) < 250
    assert "--images and --masks" in str(told.value)


def test_polygons_are_led_to_prepare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    folder = tmp_path / "my set/batch one"
    for n in range(9):
        save_pair(folder / f"{n}.jpg", tmp_path / "mask.png")
        points = [[4, 4], [40, 4], [40, 30 + n]]
        content = {
            "shapes": [{"label": "cat", "points": points, "shape_type": "polygon"}],
            "imagePath": f"{n}.jpg",
            "imageHeight": 48,
            "imageWidth": 64,
        }
        (folder / f"{n}.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="holds polygons of Labelme") as told:
        write_config(tmp_path / "my set", tmp_path / "a.yaml")
    typed = shlex.split(str(told.value).partition("draw them first: ")[2])
    assert typed[:4] == ["python", "train.py", "prepare", "labelme"]
    typed[-1] = str(tmp_path / "poly masks")  # names that no layout knows
    main(typed[2:])
    after = capsys.readouterr().out.partition("next: ")[2]
    config = tmp_path / "drawn.yaml"
    main([*shlex.split(after)[2:], "--output", str(config)])
    section = yaml.safe_load(config.read_text())["data"]["init_args"]
    data = FolderDataModule(**section)
    assert sorted(names_of(data, "train") + names_of(data, "val")) == [str(n) for n in range(9)]
    assert data.class_names == ("background", "cat")


def test_coco_file_is_led_to_prepare(tmp_path: Path) -> None:
    save_pair(tmp_path / "d/images/a.jpg", tmp_path / "mask.png")
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [], "categories": []}
    (tmp_path / "d/all.json").write_text(json.dumps(content))
    images, masks = tmp_path / "d/images", tmp_path / "d/masks"
    command = f"prepare coco {tmp_path / 'd/all.json'} --images {images} --output {masks}"
    with pytest.raises(DataError, match=re.escape(command)):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


@pytest.mark.parametrize("split", ["train", "seq0"])
def test_polygons_of_splits_are_drawn_apart(tmp_path: Path, split: str) -> None:
    for folder in (split, "val"):
        for n in range(2):
            save_pair(tmp_path / f"d/{folder}/{n}.jpg", tmp_path / "mask.png")
            content = {"shapes": [], "imagePath": f"{n}.jpg"}
            (tmp_path / f"d/{folder}/{n}.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="polygons of Labelme") as told:
        write_config(tmp_path / "d", tmp_path / "a.yaml")
    source = tmp_path / "d/train" if split == "train" else tmp_path / "d"
    assert f"prepare labelme {source} --output {source}/masks" in str(told.value)
    assert ("the other 2 JSON file(s), with the same --classes" in str(told.value)) == (
        split == "train"
    )


def test_drawn_masks_of_a_split_are_led_to_patterns(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save_pair(tmp_path / f"d/{split}/0.jpg", tmp_path / f"d/{split}/masks/0.png")
        content = json.dumps({"shapes": [], "imagePath": "0.jpg"})
        (tmp_path / f"d/{split}/0.json").write_text(content)
    with pytest.raises(DataError, match="in no layout that is known; type: ") as told:
        write_config(tmp_path / "d", tmp_path / "a.yaml")
    typed = shlex.split(str(told.value).partition("type: ")[2])
    assert typed[-4::2] == ["--images", "--masks"]
    patterns = (typed[-3], typed[-1])
    assert write_config(tmp_path / "d", tmp_path / "a.yaml", patterns=patterns).n_images == 2


def test_missing_mask_matters_more_than_polygons(tmp_path: Path) -> None:
    for n in range(3):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png")
        content = json.dumps({"shapes": [], "imagePath": f"{n}.png"})
        (tmp_path / f"d/images/{n}.json").write_text(content)
    (tmp_path / "d/masks/1.png").unlink()
    with pytest.raises(DataError, match=r"1 image\(s\) have no mask: .*1\.png"):
        write_config(tmp_path / "d", tmp_path / "a.yaml")


def test_prepared_splits_share_one_config(tmp_path: Path) -> None:
    for split in ("train", "val"):
        save_pair(tmp_path / f"d/{split}/photos/0.png", tmp_path / f"d/{split}/poly/0.png")
        arguments = init_arguments(tmp_path / f"d/{split}/photos", tmp_path / f"d/{split}/poly")
        assert arguments[2::2] == ["{split}/photos/**/*", "{split}/poly/{subfolder}/{stem}.png"]
    guess = write_config(tmp_path / "d", tmp_path / "d.yaml", patterns=(arguments[2], arguments[4]))
    assert guess.n_images == 2
    assert "val_fraction" not in guess.arguments


def test_wrong_paths_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(9):
        save_pair(tmp_path / f"d/images/{n}.png", tmp_path / f"d/masks/{n}.png")
    folder = str(tmp_path / "d")
    (tmp_path / "mine").write_text("")
    main(["init", folder, "--output", str(tmp_path / "a.yaml")])
    for output, said in (
        ("a.yaml", "a.yaml exists; name another file with --output"),
        ("mine/b.yaml", "mine"),
        ("d", "exists"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["init", folder, "--output", str(tmp_path / output)])
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == 1
    (tmp_path / "d/masks/classes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"classes.txt is no text in UTF-8"):
        write_config(tmp_path / "d", tmp_path / "c.yaml")


@pytest.mark.parametrize(("n_columns", "weights"), [(4, [0.26, 1.0]), (30, None)])
def test_rare_class_is_weighed(tmp_path: Path, n_columns: int, weights: list[float] | None) -> None:
    ids = np.zeros((48, 64), np.uint8)
    ids[:, :n_columns] = 255  # of 64 columns: 6.25 % or nearly half
    for split in ("train", "val"):
        save_pair(tmp_path / f"d/{split}/images/0.png", tmp_path / f"d/{split}/masks/0.png", ids)
    write_config(tmp_path / "d", tmp_path / "d.yaml")
    model = yaml.safe_load((tmp_path / "d.yaml").read_text())["model"]
    assert model.get("loss", {}).get("init_args", {}).get("class_weight") == weights
