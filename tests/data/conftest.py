"""Tiny folder data sets, as a user would have them on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WritePair = Callable[..., None]


def _write_pair(
    root: Path, split: str, stem: str, shape: tuple[int, int] = (24, 32), n_values: int = 3
) -> None:
    rng = np.random.default_rng([*stem.encode()])
    for kind, array in (
        ("images", rng.integers(0, 256, (*shape, 3))),
        ("masks", rng.choice([*range(n_values), 255], shape)),
    ):
        folder = root / split / kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(np.uint8)).save(folder / f"{stem}.png")


@pytest.fixture
def write_pair() -> WritePair:
    """Write ``root/split/{images,masks}/stem.png``; mask values 0 .. n_values - 1 and 255."""
    return _write_pair


@pytest.fixture
def folder_root(tmp_path: Path) -> Path:
    """Five training pairs of one size, nine validation pairs of two sizes."""
    for number in range(5):
        _write_pair(tmp_path, "train", f"t{number}")
    for number in range(9):
        _write_pair(tmp_path, "val", f"v{number}", (24, 32) if number % 3 else (32, 24))
    return tmp_path


def _image(path: Path, shape: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([*path.stem.encode()]).integers(0, 256, (*shape, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def _labels(path: Path, shape: tuple[int, int], values: list[int], palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng([*path.stem.encode()]).choice(values, shape).astype(np.uint8)
    image = Image.fromarray(drawn)
    if palette:
        image.putpalette([(7 * n) % 256 for n in range(768)])  # turns the mode from L to P
    image.save(path)


@pytest.fixture
def ade20k_root(tmp_path: Path) -> Path:
    """ADEChallengeData2016 with 5 training and 3 validation images; labels 0..150."""
    home = tmp_path / "ADEChallengeData2016"
    for split, short, count in (("training", "train", 5), ("validation", "val", 3)):
        for number in range(1, count + 1):
            stem, shape = f"ADE_{short}_{number:08d}", (40 + number % 2, 56)
            _image(home / "images" / split / f"{stem}.jpg", shape)
            _labels(home / "annotations" / split / f"{stem}.png", shape, [*range(151)])
    return tmp_path


VOC_TRAIN, VOC_VAL = ["2007_000032", "2007_000039"], ["2007_000033", "2007_000042"]
SBD_TRAIN, SBD_VAL = ["2007_000039", "2008_000002", "2007_000033"], ["2008_000003"]


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    """VOC 2012 and SBD; one image in both training lists, one of SBD's in VOC's val."""
    from scipy.io import savemat

    voc, sbd = tmp_path / "VOCdevkit/VOC2012", tmp_path / "benchmark_RELEASE/dataset"
    for stem in {*VOC_TRAIN, *VOC_VAL, *SBD_TRAIN, *SBD_VAL}:
        _image(voc / "JPEGImages" / f"{stem}.jpg", (30, 42))
    for stem in VOC_TRAIN + VOC_VAL:
        _labels(voc / "SegmentationClass" / f"{stem}.png", (30, 42), [*range(21), 255], True)
    for stem in SBD_TRAIN + SBD_VAL:
        drawn = np.random.default_rng([1, *stem.encode()]).integers(0, 21, (30, 42))
        record = np.zeros((1,), [("Segmentation", object), ("CategoriesPresent", object)])
        record[0] = (drawn.astype(np.uint8), np.arange(21, dtype=np.uint8))
        (sbd / "cls").mkdir(parents=True, exist_ok=True)
        savemat(sbd / "cls" / f"{stem}.mat", {"GTcls": record[None]})
    lists = voc / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for path, ids in (
        (lists / "train.txt", VOC_TRAIN),
        (lists / "val.txt", VOC_VAL),
        (sbd / "train.txt", SBD_TRAIN),
        (sbd / "val.txt", SBD_VAL),
    ):
        path.write_text("\n".join(ids) + "\n")
    return tmp_path


@pytest.fixture
def cityscapes_root(tmp_path: Path) -> Path:
    """Two cities in train and one in val; labels 0..33; train ids beside one image."""
    for split, city in (("train", "aachen"), ("train", "ulm"), ("val", "munster")):
        for frame in (19, 20):
            stem = f"{city}_000000_{frame:06d}"
            _image(tmp_path / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", (32, 64))
            labels = tmp_path / f"gtFine/{split}/{city}/{stem}_gtFine_labelIds.png"
            _labels(labels, (32, 64), [*range(34)])
    _labels(
        tmp_path / "gtFine/train/ulm/ulm_000000_000020_gtFine_labelTrainIds.png",
        (32, 64),
        [*range(19), 255],
    )
    return tmp_path
