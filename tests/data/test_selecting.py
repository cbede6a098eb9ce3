"""Subsets, repeated rare classes, class groups and the cache: the same pixels, fewer or more."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seglab.data import CityscapesDataModule, DataError, FolderDataModule, ScenesDataModule
from seglab.data.inspection.doctor import doctor

NAMES = ["a", "b", "c"]


def folder(root: Path, **options: Any) -> FolderDataModule:
    options = {"crop_size": None, "num_workers": 0, "batch_size": 1} | options
    data = FolderDataModule(str(root), NAMES, **options)
    data.setup("fit")
    return data


def train_names(data: Any) -> list[str]:
    return [data.train_dataset[index]["name"] for index in range(len(data.train_dataset))]


def test_smaller_shares_are_parts_of_larger_ones() -> None:
    chosen: list[set[str]] = []
    for limit in (0.1, 0.3, 1.0):
        data = ScenesDataModule(size=32, train_length=30, val_length=2, limit=limit)
        data.setup("fit")
        chosen.append(set(train_names(data)))
    assert [len(names) for names in chosen] == [3, 9, 30]
    assert chosen[0] < chosen[1] < chosen[2]
    assert len(data.val_dataset) == 2


def test_lists_choose_by_name(folder_root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("t3\nt1\n")
    assert train_names(folder(folder_root, limit=str(tmp_path / "list.txt"))) == ["t3", "t1"]


def test_unknown_names_in_a_list(folder_root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("t3 t1.png t9")
    message = r"lists 3 names, 2 of which .*\['t1.png', 't9'\]; a name looks like 't0'"
    with pytest.raises(DataError, match=message):
        folder(folder_root, limit=str(tmp_path / "list.txt"))
    with pytest.raises(DataError, match=r"cannot read data.limit nowhere.txt: No such file"):
        folder(folder_root, limit="nowhere.txt")


@pytest.mark.parametrize("limit", [0.0, 1.5, -1])
def test_impossible_shares(folder_root: Path, limit: float) -> None:
    with pytest.raises(
        ValueError, match=rf"data.limit is {limit}; it must be above 0 and at most 1"
    ):
        folder(folder_root, limit=limit)


def test_rare_classes_are_repeated_as_lvis_says(tmp_path: Path) -> None:
    """Class b in 1 of 100 images, threshold 1/4: factor sqrt(0.25 / 0.01) = 5."""
    for number in range(100):
        for kind, array in (
            ("images", np.zeros((4, 4, 3))),
            ("masks", np.full((4, 4), 1 if number == 7 else 2 if number < 50 else 0)),
        ):
            for split in ("train", "val"):
                target = tmp_path / split / kind / f"{number:03d}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(target)
    data = folder(tmp_path, repeat_rare=0.25)
    counts = Counter(train_names(data))
    assert counts.pop("007") == 5
    assert set(counts.values()) == {1}
    assert len(data.val_dataset) == 100
    # a fraction is rounded by chance: threshold 0.9 gives class c (49 %) the factor 1.355
    repeated = Counter(train_names(folder(tmp_path, repeat_rare=0.9)))
    extra = sum(repeated[f"{n:03d}"] - 1 for n in range(50) if n != 7)
    assert abs(extra - 0.355 * 49) < 3.3 * (49 * 0.355 * 0.645) ** 0.5


def test_groups_join_and_drop_classes(folder_root: Path) -> None:
    plain = folder(folder_root)
    data = folder(folder_root, class_groups={"rest": ["c"], "thing": ["a"]})
    assert (data.num_classes, data.class_names) == (2, ("rest", "thing"))
    assert data.palette == (plain.palette[2], plain.palette[0])
    table = np.full(256, 255)
    table[[2, 0]] = 0, 1
    for dataset, before in (
        (data.train_dataset, plain.train_dataset),
        (data.val_dataset, plain.val_dataset),
    ):
        for index in range(len(dataset)):
            expected = table[before[index]["mask"].numpy()]
            assert (dataset[index]["mask"].numpy() == expected).all()


def test_groups_of_an_official_set(cityscapes_root: Path) -> None:
    groups = {"flat": ["road", "sidewalk"], "vehicle": ["car", "bus", "truck"]}
    data = CityscapesDataModule(str(cityscapes_root), class_groups=groups, num_workers=0)
    data.setup("fit")
    assert set(np.unique(data.val_dataset[0]["mask"])) == {0, 1, 255}
    diagnosis = doctor(data)
    assert diagnosis.faults == ()
    assert diagnosis.class_names == ("flat", "vehicle")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"x": ["a", "bb"]}, r"'x' names no class 'bb'; did you mean 'b'\?"),
        ({"x": ["a"], "y": ["a"]}, r"'y' is empty or takes \['a'\] again"),
        ({"x": []}, r"'x' is empty"),
    ],
)
def test_impossible_groups(folder_root: Path, groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folder(folder_root, class_groups=groups)


def pixels(data: Any, epoch: int = 0) -> list[bytes]:
    samples = [data.train_dataset[epoch, index] for index in range(len(data.train_dataset))]
    return [s["image"].numpy().tobytes() + s["mask"].numpy().tobytes() for s in samples]


@pytest.mark.parametrize("crop_size", [None, (16, 16)])
def test_cache_changes_no_pixel(folder_root: Path, tmp_path: Path, crop_size: Any) -> None:
    expected = pixels(folder(folder_root, crop_size=crop_size, value_map={2: 255}))
    for _ in range(2):  # filling the cache, then reading it
        cached = folder(
            folder_root, crop_size=crop_size, value_map={2: 255}, cache_folder=str(tmp_path / "c")
        )
        assert pixels(cached) == expected
    assert len(list((tmp_path / "c").iterdir())) == 10  # image and mask of each
    # another meaning of the values is served from the same files
    assert pixels(folder(folder_root, cache_folder=str(tmp_path / "c"))) == pixels(
        folder(folder_root)
    )
    assert len(list((tmp_path / "c").iterdir())) == 10  # image and mask of each


def test_cache_is_read_instead_of_the_files(folder_root: Path, tmp_path: Path) -> None:
    cached = folder(folder_root, cache_folder=str(tmp_path / "c"))
    expected = pixels(cached)
    for path in (folder_root / "train").rglob("*.png"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert pixels(cached) == expected


def test_changed_files_are_decoded_again(folder_root: Path, tmp_path: Path) -> None:
    first = pixels(folder(folder_root, cache_folder=str(tmp_path / "c")))
    image = Image.fromarray(np.full((24, 32, 3), 7, np.uint8))
    image.save(folder_root / "train/images/t0.png")
    second = pixels(folder(folder_root, cache_folder=str(tmp_path / "c")))
    assert second[0][: 24 * 32 * 3] == bytes([7]) * (24 * 32 * 3)
    assert second[1:] == first[1:]


def test_cache_stays_within_its_bound(folder_root: Path, tmp_path: Path) -> None:
    bound = 3.5 * 24 * 32 * 4
    data = folder(folder_root, cache_folder=str(tmp_path / "c"), cache_gib=bound / 2**30)
    assert pixels(data) == pixels(folder(folder_root))
    files = list((tmp_path / "c").iterdir())
    assert len(files) == 6  # image and mask of three
    assert sum(path.stat().st_size for path in files) < bound + 3 * 200  # headers


def test_cache_is_for_files() -> None:
    with pytest.raises(DataError, match=r"data.cache_folder is for images in files"):
        ScenesDataModule(size=32, cache_folder="anywhere").setup("fit")


def test_list_that_is_no_text_is_refused(folder_root: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(DataError, match=r"data.limit .*names.txt is no text"):
        folder(folder_root, limit=str(tmp_path / "names.txt"))
