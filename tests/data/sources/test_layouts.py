"""Images and masks are paired in the layouts people have; nothing is lost without a word."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seglab.data import DataError, FolderDataModule

IMAGE = np.zeros((8, 9, 3), np.uint8)
MASK = np.resize(np.uint8([0, 1]), (8, 9))


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_mask = "mask" in name or "label" in name
        Image.fromarray(MASK if is_mask else IMAGE).save(path)


def data(root: Path, **options: Any) -> FolderDataModule:
    return FolderDataModule(str(root), ["a", "b"], crop_size=None, num_workers=0, **options)


def names(root: Path, split: str = "train", **options: Any) -> list[str]:
    source = data(root, **options).make_source(split)
    for index in range(len(source)):
        assert (source.read(index)[1] == MASK).all()
    return [source.name(index) for index in range(len(source))]


def test_suffixes_beside_each_other_in_nested_folders(tmp_path: Path) -> None:
    places = [*(f"x/{n}" for n in range(9)), *(f"y/z/{n}" for n in range(9))]
    write(tmp_path, *(f"{place}_img.png" for place in places))
    write(tmp_path, *(f"{place}_label.png" for place in places))
    options = {"images": "**/*_img.png", "masks": "{stem}_label.png", "folds": 2}
    found = names(tmp_path, "val", **options) + names(tmp_path, **options)
    assert sorted(found) == [f"{place}_img" for place in places]


def test_masks_beside_images_of_any_name(tmp_path: Path) -> None:
    write(tmp_path, *(f"{n}.jpg" for n in range(9)), *(f"{n}_mask.png" for n in range(9)))
    options = {"images": "*", "masks": "{stem}_mask.png", "val_fraction": 0.4}
    # the pattern matches the masks too, which are no images
    assert sorted(names(tmp_path, **options) + names(tmp_path, "val", **options)) == [*"012345678"]


def test_mirrored_folders(tmp_path: Path) -> None:
    write(
        tmp_path, "train/img/a/1.png", "train/masks/a/1.png", "val/img/b/1.png", "val/masks/b/1.png"
    )
    options = {"images": "{split}/img/**/*", "masks": "{split}/masks/{subfolder}/{stem}"}
    assert names(tmp_path, **options) == ["a/1"]
    assert names(tmp_path, "val", **options) == ["b/1"]


def test_list_with_and_without_names_of_columns(tmp_path: Path) -> None:
    write(tmp_path, "i/1.png", "m/mask1.png", "i/2.png", "m/mask2.png")
    (tmp_path / "a.csv").write_text("i/1.png,m/mask1.png,train\ni/2.png,m/mask2.png,val\n")
    (tmp_path / "b.csv").write_text(
        "split;mask;image\nval;m/mask2.png;i/2.png\ntrain;m/mask1.png;i/1.png\n"
    )
    (tmp_path / "c.txt").write_text("i/1.png m/mask1.png train\n\ni/2.png m/mask2.png val")
    for file in ("a.csv", "b.csv", "c.txt"):
        assert names(tmp_path, list=str(tmp_path / file)) == ["i/1"]
        assert names(tmp_path, "val", list=str(tmp_path / file)) == ["i/2"]


def test_list_errors_name_the_line(tmp_path: Path) -> None:
    write(tmp_path, "i/1.png", "m/mask1.png")
    file = tmp_path / "a.csv"
    file.write_text("i/1.png,m/mask1.png\ni/2.png,m/mask1.png\n")
    with pytest.raises(DataError, match=r"a.csv, line 2: no file .*i/2.png"):
        names(tmp_path, list=str(file))
    file.write_text("i/1.png\n")
    with pytest.raises(DataError, match=r"a.csv, line 1: .* is not image,mask"):
        names(tmp_path, list=str(file))
    file.write_text("i/1.png,m/mask1.png\n")
    with pytest.raises(DataError, match=r"names no splits; .*val_fraction: 0.2"):
        names(tmp_path, list=str(file))


def test_mask_without_image_is_not_lost(tmp_path: Path) -> None:
    write(tmp_path, "train/images/1.png", "train/masks/1.png", "train/masks/2.png")
    with pytest.raises(DataError, match=r"1 mask\(s\) have no image .*masks/2.png"):
        names(tmp_path)


def test_two_masks_of_an_image_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train/images/1.png", "train/masks/1.png", "train/masks/1.tif")
    with pytest.raises(DataError, match=r"are both masks of .*1.png"):
        names(tmp_path)


def test_division_never_parts_a_group_and_moves_nothing(tmp_path: Path) -> None:
    many = [f"v{video}_{frame}" for video in range(30) for frame in range(3)]
    write(tmp_path, *(f"i/{n}.png" for n in many), *(f"masks/{n}.png" for n in many))
    options = {"images": "i/*", "masks": "masks/{stem}", "group": r"^(v\d+)_"}
    train, val = (set(names(tmp_path, s, val_fraction=0.3, **options)) for s in ("train", "val"))
    assert train | val == set(many)
    assert {n.split("_")[0] for n in train}.isdisjoint(n.split("_")[0] for n in val)
    assert 15 <= len(val) <= 40  # of 90
    write(tmp_path, "i/v99_0.png", "masks/v99_0.png")
    again = set(names(tmp_path, "val", val_fraction=0.3, **options))
    assert again - {"v99_0"} == val


def test_folds_cover_every_image_once(tmp_path: Path) -> None:
    many = [str(n) for n in range(40)]
    write(tmp_path, *(f"i/{n}.png" for n in many), *(f"masks/{n}.png" for n in many))
    options = {"images": "i/*", "masks": "masks/{stem}", "folds": 4}
    parts = [names(tmp_path, "val", fold=fold, **options) for fold in range(4)]
    assert sorted(name for part in parts for name in part) == sorted(many)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.5}, "must be between 0 and 1"),
        ({"val_fraction": 0.2, "folds": 3}, "give one"),
        ({"folds": 3, "fold": 3}, "0 <= fold < folds"),
        ({"group": "("}, "no regular expression"),
        ({"colors": {"a": [0, 0, 0], "b": [1, 1, 1]}, "value_map": {3: 1}}, "give one"),
    ],
)
def test_contradictions_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(Path("anywhere"), **options)


def test_binary_masks_of_0_and_255_do_not_train_on_nothing(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path, f"{split}/images/1.png", f"{split}/masks/1.png")
        Image.fromarray(MASK * np.uint8(255)).save(tmp_path / split / "masks" / "1.png")
    with pytest.raises(DataError, match=r"if it is 'b', set data.value_map: \{255: 1\}"):
        data(tmp_path).setup("fit")
    module = data(tmp_path, value_map={255: 1})
    module.setup("fit")
    assert (module.train_dataset[0]["mask"].numpy() == MASK).all()


def test_deep_images_train_as_floats(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 4096, (40, 50, 4)).astype(np.uint16)
    for split in ("train", "val"):
        write(tmp_path, f"{split}/masks/1.png")
        Image.fromarray(np.resize(np.uint8([0, 1]), (40, 50))).save(
            tmp_path / split / "masks/1.png"
        )
        (tmp_path / split / "images").mkdir()
        np.save(tmp_path / split / "images" / "1.npy", raw)
    module = FolderDataModule(
        str(tmp_path), ["a", "b"], crop_size=(32, 32), channels=4, value_range=(0, 4095)
    )
    module.setup("fit")
    sample = module.train_dataset[0, 0]
    assert sample["image"].shape == (4, 32, 32)
    assert sample["image"].dtype.is_floating_point
    whole = module.val_dataset[0]["image"].numpy()
    np.testing.assert_allclose(whole, np.moveaxis(raw, 2, 0) * (255 / 4095), rtol=1e-5)


def test_masks_in_jpeg_are_told_from_missing_ones(tmp_path: Path) -> None:
    write(tmp_path, "train/images/1.png", "train/masks/1.jpg")
    with pytest.raises(DataError, match=r"no 1.png; 1.jpg cannot hold class ids, save masks as"):
        names(tmp_path)


def test_lists_of_names_choose_the_images(tmp_path: Path) -> None:
    write(tmp_path, *(f"images/{n}.jpg" for n in "abc"), *(f"masks/{n}.png" for n in "ab"))
    (tmp_path / "train.txt").write_text("images/b.jpg\r\n\n")
    (tmp_path / "val.txt").write_text("a\n")
    options = {
        "list": str(tmp_path / "{split}.txt"),
        "images": "images/*",
        "masks": "masks/{stem}",
    }
    assert (names(tmp_path, **options), names(tmp_path, "val", **options)) == (["b"], ["a"])
    with pytest.raises(DataError, match=r"no file .*test\.txt"):
        names(tmp_path, "test", **options)
    with pytest.raises(DataError, match=r"has splits already; leave out \{split\}"):
        names(tmp_path, **options, val_fraction=0.2)
    for text, message in (
        ("a\nd", r"train\.txt: 1 name\(s\) of the list are no image .*: d; correct the list"),
        ("c", r"train\.txt: 1 image\(s\) have no mask: .*c\.jpg"),
        ("", r"train\.txt is empty"),
        ("a\na.jpg", r"train\.txt names 'a' twice"),
    ):
        (tmp_path / "train.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            names(tmp_path, **options)


def test_a_name_of_two_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "images/x/1.png", "images/y/1.png", "masks/x/1.png", "masks/y/1.png")
    options = {
        "list": str(tmp_path / "{split}.txt"),
        "images": "images/**/*",
        "masks": "masks/{subfolder}/{stem}",
    }
    (tmp_path / "train.txt").write_text("y/1")
    assert names(tmp_path, **options) == ["y/1"]
    (tmp_path / "train.txt").write_text("1")
    with pytest.raises(DataError, match=r"name '1' means images/x/1\.png and images/y/1\.png"):
        names(tmp_path, **options)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_patterns_of_masks_that_blend_ids_are_refused(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, "train/images/1.jpg", f"train/masks/1{suffix}")
    with pytest.raises(
        DataError, match=rf"asks for \{suffix} files, .* '\{{split}}/masks/.*\.png'"
    ):
        names(tmp_path, masks=f"{{split}}/masks/{{stem}}{suffix}")


@pytest.mark.parametrize("end", ["", ".png"])
def test_other_kinds_of_files_beside_masks_are_left_alone(tmp_path: Path, end: str) -> None:
    write(tmp_path, "train/images/1.png", "train/masks/1_label.png", "train/masks/1_color.png")
    options = {"masks": f"{{split}}/masks/{{stem}}_label{end}"}
    assert names(tmp_path, **options) == ["1"]
    write(tmp_path, "train/masks/3_label.png")
    with pytest.raises(DataError, match=r"1 mask\(s\) have no image .*3_label\.png"):
        names(tmp_path, **options)
