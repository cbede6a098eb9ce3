"""Transforms that would spoil pixels or labels are refused before training."""

import albumentations as A
import numpy as np
import pytest

from seglab.data import DataError, FolderDataModule
from seglab.data.transforms import (
    BandDistortion,
    Pad,
    PhotoMetricDistortion,
    RandomResizeCrop,
    standard_transforms,
)
from seglab.data.transforms.augment import Augment


def data(transforms: list[object], **options: object) -> FolderDataModule:
    return FolderDataModule("nowhere", ["a", "b"], transforms=transforms, **options)  # type: ignore[arg-type]


DEEP = {"channels": 4, "value_range": (0, 4095)}


@pytest.mark.parametrize(
    ("transform", "options", "why"),
    [
        (A.ColorJitter(), {"channels": 4}, "expects 1-channel or 3-channel"),
        (PhotoMetricDistortion(), {"channels": 4}, "makes the shape"),
        (PhotoMetricDistortion(), {"value_range": (0, 65535)}, "float32 images of 3 band"),
        (A.GaussianBlur(), DEEP, r"takes values in 0..255 to 1..1"),  # clipped without a word
        (A.OneOf([A.HorizontalFlip(), A.RandomBrightnessContrast()]), DEEP, "to 1..1"),
        (A.Normalize(), DEEP, "takes values in 0..255 to -1"),
        (Pad(64, 64), {"channels": 4}, "could not broadcast"),
    ],
)
def test_transforms_of_other_images_are_refused(
    transform: object, options: dict[str, object], why: str
) -> None:
    with pytest.raises(DataError, match=rf"^data.transforms: \w+ cannot work on .*{why}.*leave it"):
        data([transform], **options)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("is_deep", [False, True])
def test_the_standard_recipe_suits_any_bands(channels: int, is_deep: bool) -> None:
    recipe = standard_transforms((32, 32), is_rgb=False)
    data(recipe, channels=channels, value_range=(0, 1) if is_deep else None)
    image = np.full((20, 50, channels), 100, np.float32 if is_deep else np.uint8)
    mask = np.ones((20, 50), np.uint8)
    for epoch in range(4):
        found, label = Augment(recipe)(image, mask, epoch, 0)
        assert found.shape == (32, 32, channels)
        assert found.dtype == image.dtype
        assert {*np.unique(label)} <= {1, 255}


def test_fitting_transforms_pass() -> None:
    data([A.RandomRotate90(), A.RandomCrop(512, 512), BandDistortion(), Pad(9, 9, 1.0)], **DEEP)
    data([A.ColorJitter(), RandomResizeCrop(64, 64), A.CoarseDropout(), Pad(64, 64)])


@pytest.mark.parametrize("transform", [A.Rotate(), A.Affine(rotate=20), A.PadIfNeeded(99, 99)])
def test_what_a_rotation_uncovers_is_no_class(transform: object) -> None:
    with pytest.raises(DataError, match="labels pixels 0 that have no label: set its fill_mask"):
        data([transform])


def test_ignored_borders_pass() -> None:
    data([A.Rotate(fill_mask=255), A.PadIfNeeded(99, 99, fill_mask=255)])


def test_large_single_band_images_keep_their_axis() -> None:
    image, mask = np.zeros((300, 400, 1), np.uint8), np.zeros((300, 400), np.uint8)
    mask[::2] = 1
    found = RandomResizeCrop(16, 16, ratio=(2.0, 2.0))(image=image, mask=mask)["image"]
    assert found.shape == (16, 16, 1)
