"""A checkpoint is used in three lines, and says what `validate` would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import seglab
from seglab.data import ScenesDataModule
from seglab.metrics import SegmentationMetrics


@pytest.fixture(scope="module")
def checkpoint(fitted: Path) -> Path:
    return fitted / "checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)


def test_every_kind_of_image_gives_the_same_ids(
    checkpoint: Path, picture: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    model = seglab.load(checkpoint, device="cpu")
    ids = model.predict(picture)
    assert (ids.shape, ids.dtype) == ((37, 53), np.uint8)
    for same in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(picture),
        torch.from_numpy(picture).permute(2, 0, 1),
    ):
        assert (model.predict(same) == ids).all()


def test_ids_are_the_argmax_of_the_network(checkpoint: Path, picture: np.ndarray) -> None:
    model = seglab.load(checkpoint, device="cpu")
    image = torch.from_numpy(picture).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = model.task.network(image)
    assert (model.predict(picture) == logits.argmax(1)[0].numpy()).all()
    chances = model.predict(picture, probabilities=True)
    np.testing.assert_allclose(chances, logits.softmax(1)[0].numpy(), atol=1e-6)


def test_figures_are_those_of_validate(checkpoint: Path, fitted: Path, logged) -> None:
    model = seglab.load(checkpoint, device="cpu")
    data = ScenesDataModule(size=32, train_length=8, val_length=5, num_workers=0)
    data.setup("validate")
    metrics = SegmentationMetrics(data.num_classes)
    for sample in data.val_dataset:
        ids = torch.from_numpy(model.predict(sample["image"]))
        metrics.update(ids[None].long(), sample["mask"][None].long())
    assert float(metrics.compute()["mIoU"]) == pytest.approx(
        logged(fitted, "val/mIoU")[-1], abs=1e-6
    )


def test_lists_and_streams_of_unequal_images(checkpoint: Path, picture: np.ndarray) -> None:
    model = seglab.load(checkpoint, device="cpu")
    images = [picture, picture[:20], picture[:1, :1]]
    shapes = [ids.shape for ids in model.predict(images)]
    assert shapes == [(37, 53), (20, 53), (1, 1)]
    assert [ids.shape for ids in model.predict_many(image for image in images)] == shapes


def test_overlay_mixes_the_colours_of_the_classes(checkpoint: Path, picture: np.ndarray) -> None:
    model = seglab.load(checkpoint, device="cpu")
    expected = (picture.astype(float) + model.palette[model.predict(picture)]) / 2
    assert np.abs(model.overlay(picture) - expected).max() <= 1
    assert len(model.class_names) == len(model.palette) == 8


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 7), np.uint8), r"has 7 band\(s\)"),
        (np.zeros((4, 4, 3), np.uint16), r"value_range"),
        (np.zeros((4, 4, 3, 1), np.uint8), r"got shape \(4, 4, 3, 1\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got shape \(0, 4, 3\)"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_image_is_refused(checkpoint: Path, image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seglab.load(checkpoint, device="cpu").predict(image)


def test_grey_image_is_taken_as_in_training(checkpoint: Path, picture: np.ndarray) -> None:
    model = seglab.load(checkpoint, device="cpu")
    grey = picture[..., 0]
    assert (model.predict(grey) == model.predict(np.dstack([grey] * 3))).all()


def test_bare_weights_are_refused_in_a_sentence(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth holds no config: seglab.load takes"):
        seglab.load(tmp_path / "weights.pth")


def test_channels_first_arrays_are_told_to_turn(checkpoint: Path, picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"channels last: give array\.transpose\(1, 2, 0\)"):
        seglab.load(checkpoint, "cpu").predict(picture.transpose(2, 0, 1))
