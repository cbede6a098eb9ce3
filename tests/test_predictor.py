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
from seglab.predictor import Predictor


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
        (np.zeros((4, 4, 3), np.uint16), "holds uint16 .* takes 8-bit images of 3 bands"),
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


def counted(model: Predictor) -> list[tuple[int, ...]]:
    """Shapes that the network is given from now on."""
    shapes: list[tuple[int, ...]] = []
    model.task.network.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    inner = model.task.network.decode

    def decode(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shapes.append(tuple(image.shape))
        return inner(image)

    model.task.network.decode = decode
    return shapes


def test_images_of_one_size_share_a_batch(checkpoint: Path) -> None:
    model = seglab.load(checkpoint, device="cpu")
    random = np.random.default_rng(1)
    sizes = [(20, 30), (30, 20), (20, 30), (20, 30), (30, 20), (20, 30)]
    images = [random.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]
    alone = [model.predict(image) for image in images]
    shapes = counted(model)
    together = model.predict(images, batch_size=5)
    assert [shape[0] for shape in shapes] == [3, 2, 1]
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))
    chances = model.predict(images, probabilities=True)
    assert all((c.argmax(0) == a).all() for c, a in zip(chances, alone, strict=True))


def test_stream_reads_no_further_than_asked(checkpoint: Path, picture: np.ndarray) -> None:
    model = seglab.load(checkpoint, device="cpu")
    read = []

    def frames():
        for index in range(5):
            read.append(index)
            yield picture

    stream = model.predict_many(frames())
    assert read == []
    next(stream)
    assert read == [0]


def test_folder_is_a_stream_of_its_images(
    checkpoint: Path, picture: np.ndarray, tmp_path: Path
) -> None:
    model = seglab.load(checkpoint, device="cpu")
    (tmp_path / "sub").mkdir()
    Image.fromarray(picture).save(tmp_path / "sub/b.png")
    Image.fromarray(picture[:9]).save(tmp_path / "a.png")
    shapes = [ids.shape for ids in model.predict_many(tmp_path)]
    assert shapes == [(9, 53), (37, 53)]
    with pytest.raises(ValueError, match=r"give predict_many a folder"):
        model.predict_many(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="batch_size=0"):
        model.predict_many(tmp_path, batch_size=0)


def test_evaluation_rule_of_the_checkpoint_is_kept(fitted: Path, tmp_path: Path) -> None:
    content = torch.load(fitted / "checkpoints/last.ckpt", weights_only=True)
    content["config"]["data"]["init_args"]["eval_scale"] = [64, 32]
    content["config"]["model"]["inference"] = {
        "crop_size": [16, 24],
        "stride": [8, 16],
        "scales": [1.0, 1.5],
        "flip": True,
    }
    torch.save(content, tmp_path / "rule.ckpt")
    model = seglab.load(tmp_path / "rule.ckpt", device="cpu")
    plain = seglab.load(fitted / "checkpoints/last.ckpt", device="cpu").task.network
    picture = np.random.default_rng(2).integers(0, 256, (50, 60, 3)).astype(np.uint8)
    import cv2

    shown = cv2.resize(picture, (38, 32))  # the short side becomes 32
    image = torch.from_numpy(shown).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = by_hand(plain, image, (50, 60))
    found = model.predict(picture, probabilities=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (model.predict(picture) == expected.argmax(0)).mean() > 0.999


def by_hand(network: torch.nn.Module, image: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Windows (16, 24) every (8, 16), scales 1 and 1.5, flips: written out."""
    import torch.nn.functional as F

    views = []
    for scale in (1.0, 1.5):
        height, width = round(image.shape[2] * scale), round(image.shape[3] * scale)
        scaled = F.interpolate(image.float(), size=(height, width), mode="bilinear")
        for flip in (False, True):
            view = scaled.flip(3) if flip else scaled
            total, seen = torch.zeros(1, 8, height, width), torch.zeros(height, width)
            for top in sorted({min(y, height - 16) for y in range(0, height - 8, 8)}):
                for left in sorted({min(x, width - 24) for x in range(0, width - 8, 16)}):
                    window = view[:, :, top : top + 16, left : left + 24]
                    total[:, :, top : top + 16, left : left + 24] += network(window)
                    seen[top : top + 16, left : left + 24] += 1
            logits = total / seen
            logits = logits.flip(3) if flip else logits
            views.append(F.interpolate(logits, size=size, mode="bilinear").softmax(1))
    return torch.stack(views).mean(0)[0].numpy()


def test_photographs_are_turned_as_their_files_are(checkpoint: Path, tmp_path: Path) -> None:
    import cv2

    smooth = np.linspace(0, 255, 40 * 24 * 3).reshape(40, 24, 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    model = seglab.load(checkpoint, device="cpu")
    for name, shape in (("a.jpg", (24, 40)), ("a.png", (40, 24))):
        Image.fromarray(smooth).save(tmp_path / name, exif=exif)
        assert model.predict(tmp_path / name).shape == shape
        with Image.open(tmp_path / name) as opened:
            assert model.predict(opened).shape == shape
    turned = cv2.rotate(smooth, cv2.ROTATE_90_CLOCKWISE)
    near = np.abs(model.read(tmp_path / "a.jpg").astype(int) - turned).max()
    assert near < 30


def test_damaged_files_are_told_in_a_sentence(
    checkpoint: Path, picture: np.ndarray, tmp_path: Path
) -> None:
    model = seglab.load(checkpoint, device="cpu")
    Image.fromarray(picture).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (
        ("cut.jpg", "cut short"),
        ("empty.png", "cannot decode image .*0 bytes"),
        ("text.png", "cannot decode image"),
        ("none.png", "cannot read image"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(tmp_path / name)
    with (
        Image.open(tmp_path / "cut.jpg") as cut,
        pytest.raises(ValueError, match=r"cannot decode image .*cut\.jpg"),
    ):
        model.predict(cut)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "HSV"])
def test_pil_modes_are_what_their_colours_say(
    checkpoint: Path, picture: np.ndarray, mode: str
) -> None:
    model = seglab.load(checkpoint, device="cpu")
    image = Image.fromarray(picture).convert("L").convert("RGB").convert(mode)
    assert (model.predict(image) == model.predict(image.convert("RGB"))).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("I;16", (4, 4)), "not 8-bit ones; this network takes 8-bit images of 3"),
        (Image.new("F", (4, 4)), "holds float32 values .* takes 8-bit images"),
        (Image.new("RGBA", (4, 4), (1, 2, 3, 0)), "not opaque .* takes 8-bit images of 3 bands"),
        (torch.zeros(3, 4, 4, dtype=torch.bfloat16), "takes 8-bit images of 3 bands"),
        (np.full((4, 4), "x"), "holds <U1 values"),
        (np.zeros((4, 4, 3), bool), "holds bool values"),
        ((frame for frame in ()), "not generator"),
    ],
)
def test_unfit_values_are_refused_with_the_cure(
    checkpoint: Path, image: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        seglab.load(checkpoint, device="cpu").predict(image)


def test_very_long_and_tiny_images_are_labelled(checkpoint: Path, tmp_path: Path) -> None:
    model = seglab.load(checkpoint, device="cpu")
    for shape in ((1, 1), (1, 30_000), (2, 1)):
        image = np.full((*shape, 3), 7, np.uint8)
        assert model.predict(image).shape == shape
        Image.fromarray(image).save(tmp_path / "a.png")
        assert model.predict(tmp_path / "a.png").shape == shape


def test_channels_first_arrays_are_told_to_turn(checkpoint: Path, picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"channels last: give array\.transpose\(1, 2, 0\)"):
        seglab.load(checkpoint, "cpu").predict(picture.transpose(2, 0, 1))
