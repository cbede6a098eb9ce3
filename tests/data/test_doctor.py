"""The doctor finds every fault of a broken set and none in a sound one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seglab.data import ADE20KDataModule, CityscapesDataModule, FolderDataModule, VOCAugDataModule
from seglab.data.inspection.browse import browse
from seglab.data.inspection.diagnosis import Diagnosis
from seglab.data.inspection.doctor import doctor

WritePair = Callable[..., None]


def examine(root: Path, **options: Any) -> Diagnosis:
    return doctor(FolderDataModule(str(root), ["a", "b", "c"], **options), num_workers=2)


def test_sound_folder_has_no_faults(folder_root: Path) -> None:
    diagnosis = examine(folder_root)
    assert diagnosis.faults == ()
    train, val = diagnosis.splits
    assert (train.name, train.n_images, val.name, val.n_images) == ("train", 5, "val", 9)
    assert val.shapes == {(24, 32): 6, (32, 24): 3}
    assert str(diagnosis).endswith("verdict: sound: no faults")


def test_frequencies_are_those_of_the_masks(folder_root: Path) -> None:
    masks = [np.array(Image.open(p)) for p in sorted((folder_root / "train/masks").iterdir())]
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=256)
    train = examine(folder_root).splits[0]
    assert train.n_pixels == tuple(counts[:3])
    assert train.n_ignored == counts[255]
    assert train.n_images_with == (5, 5, 5)
    assert f"{counts[1] / counts.sum():.3%}" in str(examine(folder_root))


def test_broken_folder_names_every_fault(folder_root: Path, write_pair: WritePair) -> None:
    images, masks = folder_root / "train/images", folder_root / "train/masks"
    (images / "t0.png").write_bytes((images / "t0.png").read_bytes()[:-100])
    (masks / "t0.png").write_bytes(b"nothing")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(masks / "t1.png")
    for stem in ("t2", "t3"):
        Image.fromarray(np.full((24, 32), 9, np.uint8)).save(masks / f"{stem}.png")
    (folder_root / "val/images/v1.png").write_bytes((images / "t4.png").read_bytes())
    diagnosis = examine(folder_root)
    expected = [
        "train: label value 9 in 2 mask(s), 1536 pixels; first: mask",
        "t0.png is cut short",
        "cannot decode mask",
        "t1.png is 32x24 pixels but its mask",
        "1 image(s) are both in train and in val: t4 = v1",
    ]
    assert len(diagnosis.faults) == len(expected)
    for part in expected:
        assert sum(part in fault for fault in diagnosis.faults) == 1
    assert diagnosis.splits[0].n_unreadable == 4
    assert str(diagnosis).endswith("verdict: 5 fault(s)")


def test_missing_split_is_a_fault(folder_root: Path) -> None:
    (folder_root / "val").rename(folder_root / "valid")
    diagnosis = examine(folder_root)
    assert len(diagnosis.faults) == 1
    assert diagnosis.faults[0].startswith("val: no folder ")
    assert [split.name for split in diagnosis.splits] == ["train"]


def test_test_split_is_examined_if_there(folder_root: Path, write_pair: WritePair) -> None:
    write_pair(folder_root, "test", "x0")
    assert [split.name for split in examine(folder_root).splits] == ["train", "val", "test"]
    assert len(examine(folder_root, test_split="val").splits) == 2  # the same images again


def test_absent_classes_and_empty_masks_are_noted(folder_root: Path) -> None:
    for path in (folder_root / "train/masks").iterdir():
        Image.fromarray(np.full((24, 32), 255, np.uint8)).save(path)
    diagnosis = examine(folder_root)
    assert diagnosis.notes == ("train: 5 mask(s) are wholly ignored: t0, t1, t2 and 2 more",)
    (fault,) = diagnosis.faults
    assert fault.startswith("train: 3 class(es) never occur in the masks: a, b, c; ")
    assert fault.endswith("if it is 'a', set data.value_map: {255: 0}")


def test_binary_masks_of_0_and_255_are_a_fault_with_the_cure(folder_root: Path) -> None:
    for split in ("train", "val"):
        for path in (folder_root / split / "masks").iterdir():
            Image.fromarray(np.resize(np.uint8([0, 255, 255]), (24, 32))).save(path)
    data = FolderDataModule(str(folder_root), ["rest", "crack"])
    (fault,) = [fault for fault in doctor(data).faults if fault.startswith("train")]
    assert "crack; 255 means ignored and fills 66.7% of the pixels" in fault
    assert fault.endswith("if it is 'crack', set data.value_map: {255: 1}")
    cured = FolderDataModule(str(folder_root), ["rest", "crack"], value_map={255: 1})
    assert not any("never occur" in fault for fault in doctor(cured).faults)


def test_raw_values_in_the_place_of_classes_are_proposed(folder_root: Path) -> None:
    for split in ("train", "val"):
        for path in (folder_root / split / "masks").iterdir():
            Image.fromarray(np.resize(np.uint8([0, 100, 200]), (24, 32))).save(path)
    faults = examine(folder_root).faults
    assert any("data.value_map: {100: 1, 200: 2}" in fault for fault in faults)


def test_colours_are_listed_with_their_shares(folder_root: Path) -> None:
    colors = np.uint8([[128, 64, 128], [0, 0, 142], [0, 0, 142], [9, 9, 9]])
    for path in (folder_root / "train/masks").iterdir():
        Image.fromarray(colors[np.resize(np.arange(4), (24, 32))]).save(path)
    (fault,) = [fault for fault in examine(folder_root).faults if fault.startswith("train")]
    assert fault.startswith("train: 5 mask(s) hold colours")
    lines = [line.strip() for line in fault.splitlines()[2:]]
    assert lines[0] == "NAME: [0, 0, 142]  # 50.00%"
    assert sorted(lines[1:]) == ["NAME: [128, 64, 128]  # 25.00%", "NAME: [9, 9, 9]  # 25.00%"]


def test_equal_faults_are_one_line(folder_root: Path) -> None:
    for path in (folder_root / "train/masks").iterdir():
        Image.fromarray(np.zeros((9, 9), np.uint8)).save(path)
    (fault,) = [fault for fault in examine(folder_root).faults if "export" in fault]
    assert fault.endswith("[and 4 more like it]")


def test_bands_are_measured_for_the_config(folder_root: Path) -> None:
    stored = []
    for path in sorted((folder_root / "train/images").iterdir()):
        raw = np.random.default_rng(len(stored)).integers(0, 4096, (24, 32, 5)).astype(np.uint16)
        path.unlink()
        np.save(path.with_suffix(".npy"), raw)
        stored.append(raw.astype(np.float64) * 255 / 4095)
    bands = examine(folder_root, channels=5, value_range=(0, 4095)).bands
    both = json.loads(
        "[" + bands.replace("mean: ", "").replace("std: ", "").replace("\n", ",") + "]"
    )
    np.testing.assert_allclose(both[0], np.stack(stored).mean((0, 1, 2)), atol=0.01)
    np.testing.assert_allclose(both[1], np.stack(stored).std((0, 1, 2)), atol=0.01)


@pytest.mark.parametrize(
    ("fixture", "module", "n_images"),
    [
        ("ade20k_root", ADE20KDataModule, (5, 3)),
        ("voc_root", VOCAugDataModule, (4, 2)),
        ("cityscapes_root", CityscapesDataModule, (4, 2)),
    ],
)
def test_official_layouts_are_sound(
    fixture: str, module: type[Any], n_images: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    diagnosis = doctor(module(str(request.getfixturevalue(fixture))))
    assert diagnosis.faults == ()
    assert tuple(split.n_images for split in diagnosis.splits) == n_images


def test_diagnosis_goes_into_json(folder_root: Path) -> None:
    plain = json.loads(json.dumps(examine(folder_root).to_dict()))
    assert plain["splits"][1]["shapes"][0] == {"height": 24, "width": 32, "images": 6}


def test_progress_counts_samples(folder_root: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    data = FolderDataModule(str(folder_root), ["a", "b", "c"])
    doctor(data, progress=lambda *state: seen.append(state))
    assert seen == [("train", n, 5) for n in range(1, 6)] + [("val", n, 9) for n in range(1, 10)]


def test_contact_sheet_shows_the_training_samples(folder_root: Path, tmp_path: Path) -> None:
    palette = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    data = FolderDataModule(
        str(folder_root), ["a", "b", "c"], palette, crop_size=(16, 16), num_workers=0, batch_size=2
    )
    path = browse(data, tmp_path / "new" / "sheet.png", n_samples=3, columns=2)
    sheet = np.array(Image.open(path))
    first = data.train_dataset[next(iter(data.train_dataloader().sampler))]
    assert (sheet[:16, :16] == first["image"].permute(1, 2, 0).numpy()).all()
    below = sheet[20:36, :16].astype(int)
    half = (np.array([*palette, *[(255, 255, 255)] * 253])[first["mask"]] + sheet[:16, :16]) / 2
    assert abs(below - half).max() <= 1
    assert all((sheet[-48:] == color).all(-1).any() for color in palette)  # the legend
