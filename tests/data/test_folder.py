"""Own images: what is right is read as it is, what is wrong is named with its cure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seglab.data import DataError, FolderDataModule

WritePair = Callable[..., None]


def read_all(root: Path, **options: Any) -> list[dict[str, Any]]:
    names = options.pop("class_names", ["a", "b", "c"])
    data = FolderDataModule(str(root), names, crop_size=None, num_workers=0, **options)
    data.setup("fit")
    return [data.train_dataset[index] for index in range(len(data.train_dataset))]  # type: ignore[misc]


def save_mask(root: Path, values: Any, mode: str | None = None, stem: str = "t0") -> None:
    image = Image.fromarray(np.asarray(values))
    image = image.convert(mode) if mode else image
    image.save(root / "train" / "masks" / f"{stem}.png")


def test_pixels_arrive_as_stored(folder_root: Path) -> None:
    for sample in read_all(folder_root):
        for kind, tensor in (
            ("images", sample["image"].permute(1, 2, 0)),
            ("masks", sample["mask"]),
        ):
            with Image.open(folder_root / "train" / kind / f"{sample['name']}.png") as file:
                assert (np.array(file) == tensor.numpy()).all()


def test_palette_masks_give_indices(folder_root: Path) -> None:
    values = np.arange(24 * 32).reshape(24, 32).astype(np.uint8) % 3
    mask = Image.fromarray(values, mode=None).convert("P")
    mask.putpalette([9, 8, 7, 200, 100, 0, 1, 2, 3])
    mask.putdata(values.ravel().tolist())
    mask.save(folder_root / "train" / "masks" / "t0.png")
    assert (read_all(folder_root)[0]["mask"].numpy() == values).all()


def test_value_map_renames_and_ignores(folder_root: Path, write_pair: WritePair) -> None:
    save_mask(folder_root, np.resize(np.uint8([0, 7, 11, 255, 2]), (24, 32)))
    mask = read_all(folder_root, value_map={7: 1, 11: 255, 2: 0})[0]["mask"].numpy()
    assert (mask == np.resize([0, 1, 255, 255, 0], (24, 32))).all()


def test_value_map_must_lead_to_a_class(folder_root: Path) -> None:
    with pytest.raises(ValueError, match=r"value_map \{7: 3\} must lead .* 0..2 or to 255"):
        read_all(folder_root, value_map={7: 3})


def test_value_outside_the_classes(folder_root: Path) -> None:
    values = np.zeros((24, 32), np.uint8)
    values[:2, :3] = 9
    save_mask(folder_root, values)
    with pytest.raises(
        DataError, match=r"t0.png has value 9 \(6 pixels\); allowed are 0..2, 255.*value_map"
    ):
        read_all(folder_root)


@pytest.mark.slow
def test_worker_errors_are_one_sentence(folder_root: Path) -> None:
    save_mask(folder_root, np.full((24, 32), 9, np.uint8), stem="t4")
    data = FolderDataModule(str(folder_root), ["a", "b", "c"], crop_size=None, num_workers=1)
    data.setup("fit")
    with pytest.raises(DataError, match=r"^mask .*has value \d+ [^\n]*$"):
        list(data.train_dataloader())


def test_missing_folder_says_what_is_there(folder_root: Path) -> None:
    (folder_root / "val").rename(folder_root / "valid")
    with pytest.raises(FileNotFoundError, match=r"no folder .*val/images.*holds train/, valid/"):
        read_all(folder_root)


def test_missing_test_split_matters_only_to_test(folder_root: Path) -> None:
    data = FolderDataModule(str(folder_root), ["a", "b", "c"])
    data.setup("fit")
    with pytest.raises(DataError, match=r"no folder .*test/images.*data.test_split to val"):
        data.setup("test")
    other = FolderDataModule(str(folder_root), ["a", "b", "c"], test_split="val")
    other.setup("test")
    assert len(other.test_dataset) == 9


def test_image_without_mask(folder_root: Path) -> None:
    for number in range(4):
        (folder_root / "train" / "masks" / f"t{number}.png").unlink()
    with pytest.raises(DataError, match=r"4 image\(s\) have no mask: .*t0.png .* and 1 more; add"):
        read_all(folder_root)


def test_mask_without_image(folder_root: Path) -> None:
    (folder_root / "train" / "images" / "t1.png").unlink()
    with pytest.raises(DataError, match=r"1 mask\(s\) have no image .*t1.png; add the images"):
        read_all(folder_root)


def test_two_images_of_one_stem(folder_root: Path) -> None:
    images = folder_root / "train" / "images"
    (images / "t1.jpg").write_bytes((images / "t1.png").read_bytes())
    with pytest.raises(DataError, match=r"t1.jpg and .*t1.png have one stem"):
        read_all(folder_root)


def test_empty_folder(folder_root: Path) -> None:
    for path in (folder_root / "train" / "images").iterdir():
        path.unlink()
    with pytest.raises(
        DataError,
        match=r"no image in .* matches 'train/images/\*'; data.root must hold train/images",
    ):
        read_all(folder_root)


def test_sizes_that_disagree(folder_root: Path) -> None:
    save_mask(folder_root, np.zeros((24, 31), np.uint8))
    with pytest.raises(DataError, match=r"t0.png is 32x24 pixels but its mask .*t0.png is 31x24"):
        read_all(folder_root)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_masks_that_are_not_ids(folder_root: Path, mode: str) -> None:
    save_mask(folder_root, np.zeros((24, 32), np.uint8), mode)
    with pytest.raises(DataError, match=r"t0.png holds colours, not class ids; name them: data.co"):
        read_all(folder_root)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("kept", [0.6, 0.95])
def test_truncated_image(folder_root: Path, suffix: str, kept: float) -> None:
    path = folder_root / "train" / "images" / "t0.png"
    with Image.open(path) as file:
        file.save(path.with_suffix(f".{suffix}"))
    if suffix == "jpg":
        path.unlink()
    path = path.with_suffix(f".{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=rf"image .*t0.{suffix} is cut short .*replace the file"):
        read_all(folder_root)


def test_truncated_mask(folder_root: Path) -> None:
    path = folder_root / "train" / "masks" / "t0.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"cannot decode mask .*t0.png: .*; replace it"):
        read_all(folder_root)


@pytest.mark.parametrize("content", [b"", b"no picture at all"])
def test_unreadable_image(folder_root: Path, content: bytes) -> None:
    (folder_root / "train" / "images" / "t0.png").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the header of .*t0.png"):
        read_all(folder_root)


def test_predict_without_folder(folder_root: Path) -> None:
    with pytest.raises(DataError, match=r"set data.predict_folder"):
        FolderDataModule(str(folder_root), ["a", "b"]).setup("predict")


@pytest.mark.parametrize(
    ("names", "palette", "message"),
    [
        (["a", "a"], None, r"distinct.*repeated: \['a'\]"),
        (["a", "b"], [(1, 2, 3)], "palette has 1 colours for 2 classes"),
        ([], None, "class_names is empty"),
        (["cat"], None, r"one class leaves nothing to tell apart; .*\[background, NAME\]"),
    ],
)
def test_inconsistent_classes(names: list[str], palette: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FolderDataModule("anywhere", names, palette)
