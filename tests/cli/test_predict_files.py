"""`predict --input`: every way to name images, interruptions, damaged files, servers' formats."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import seglab
from seglab.cli.inputs import find_inputs
from seglab.data.classes import ADE20K_NAMES, CITYSCAPES_NAMES
from seglab.data.submission import refuse_other_classes, save_submission


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index, name in enumerate(("a.png", "b.jpg", "sub/c.png", "sub/d.png")):
        pixels = random.integers(0, 256, (20 + index % 2, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def predict(run: Callable[..., None], fitted: Path, tmp_path: Path) -> Callable[..., Path]:
    def predict(*inputs: object, options: tuple[object, ...] = ()) -> Path:
        checkpoint, output = fitted / "checkpoints/last.ckpt", tmp_path / "out"
        base = ("--ckpt_path", checkpoint, "--output", output, "--device", "cpu")
        run("predict", *base, *options, "--input", *inputs)
        return output

    return predict


def test_folder_gives_masks_that_predict_gives(
    predict: Callable[..., Path], images: Path, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = predict(images, options=("--overlays",))
    assert "4 written" in capsys.readouterr().out
    model = seglab.load(fitted / "checkpoints/last.ckpt", device="cpu")
    for path in images.rglob("*.*"):
        name = path.relative_to(images).with_suffix(".png")
        with Image.open(output / "masks" / name) as mask:
            assert (np.asarray(mask) == model.predict(path)).all()
        with Image.open(output / "overlays" / name) as picture:
            assert (np.asarray(picture) == model.overlay(path)).all()
    assert not list(output.rglob("*partial*"))


def test_run_goes_on_where_it_stopped(
    predict: Callable[..., Path], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = predict(images)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    (output / "masks/sub/c.png").unlink()
    capsys.readouterr()
    predict(images)
    said = capsys.readouterr().out
    assert "1 written" in said
    assert "3 done before" in said
    changed = [path.name for path in times if path.stat().st_mtime_ns != times[path]]
    assert changed == ["c.png"]


def test_damaged_files_stop_nothing(
    predict: Callable[..., Path], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (images / "b.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(content[: len(content) // 2])
    (images / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(images / "deep.png")
    Image.new("RGBA", (4, 4)).save(images / "clear.png")
    Image.new("L", (1, 1)).save(images / "tiny.png")
    png = bytearray((images / "a.png").read_bytes())
    png[16:24] = (100_000).to_bytes(4, "big") * 2
    (images / "huge.png").write_bytes(png)
    with pytest.raises(SystemExit) as stop:
        predict(images, images / "none.png")
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "5 written" in said
    assert "6 could not be predicted" in said
    for name in ("cut.jpg", "empty.png", "deep.png", "clear.png", "huge.png", "none.png"):
        assert sum(f"/{name}: " in line for line in said.splitlines()) == 1


def test_other_checkpoint_is_not_mixed_in(
    predict: Callable[..., Path], images: Path, fitted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(images / "a.png")
    other = ("--ckpt_path", fitted / "checkpoints/best.ckpt")
    with pytest.raises(SystemExit):
        predict(images / "a.png", options=other)
    assert "another checkpoint and modified" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict(images / "a.png", options=("--window", "16,16"))
    assert "another window (None): choose another --output" in capsys.readouterr().err


def test_other_precision_is_not_mixed_in(
    predict: Callable[..., Path], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = predict(images / "a.png") / "predict.json"
    with pytest.raises(SystemExit):
        predict(images, options=("--precision", "bf16-mixed"))
    assert "another precision (32-true): choose another --output" in capsys.readouterr().err
    known = json.loads(record.read_text())
    del known["precision"]  # as records were before
    record.write_text(json.dumps(known))
    predict(images / "a.png")
    assert "1 done before" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{cut", "[1]"])
def test_unreadable_record_is_one_sentence(
    content: str, predict: Callable[..., Path], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = predict(images / "a.png") / "predict.json"
    record.write_text(content)
    with pytest.raises(SystemExit):
        predict(images)
    assert "predict.json does not say what the masks beside it are of" in capsys.readouterr().err


def test_missing_image_is_named_once(
    predict: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        predict(tmp_path / "no.jpg")
    said = capsys.readouterr().out
    assert f"- {tmp_path / 'no.jpg'}: cannot read it: No such file" in said


def test_changed_image_is_predicted_again(
    predict: Callable[..., Path], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(images / "a.png")
    Image.new("RGB", (5, 6)).save(images / "a.png")
    output = predict(images / "a.png")
    with Image.open(output / "masks/a.png") as mask:
        assert mask.size == (5, 6)


def test_window_writes_tiled_files(predict: Callable[..., Path], images: Path) -> None:
    output = predict(images, options=("--window", "16,16"))
    assert tifffile.imread(output / "masks/a.tif").shape == (20, 30)


def test_every_way_to_name_images(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images / "list.txt").write_text("a.png\n\nsub/c.png\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{images / 'b.jpg'}\n"))
    for given, names in (
        ([str(images)], ["a", "b", "sub/c", "sub/d"]),
        ([str(images / "a.png")], ["a"]),
        ([f"{images}/**/*.png"], ["a", "c", "d"]),
        ([str(images / "list.txt")], ["a", "c"]),
        (["-"], ["b"]),
        ([str(images / "sub"), str(images / "a.png")], ["c", "d", "a"]),
    ):
        assert list(find_inputs(given)) == names
    assert list(find_inputs([str(images)], flat=True)) == ["a", "b", "c", "d"]


def test_names_that_clash_or_lack_are_refused(images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="would both be written as a"):
        find_inputs([str(images), str(tmp_path / "a.png")])
    with pytest.raises(ValueError, match="names no image"):
        find_inputs([f"{images}/*.bmp"])
    with pytest.raises(ValueError, match=r"/\*\.bmp names no image: check the pattern"):
        find_inputs([str(images), f"{images}/*.bmp"])
    with pytest.raises(FileNotFoundError, match=r"list .* does not exist"):
        find_inputs([str(images / "none.txt")])


def test_servers_get_their_own_values(tmp_path: Path) -> None:
    ids = np.array([[0, 1, 18]], np.uint8)
    save_submission(tmp_path / "c.png", ids, "cityscapes")
    save_submission(tmp_path / "a.png", np.array([[0, 149]], np.uint8), "ade20k")
    with Image.open(tmp_path / "c.png") as city, Image.open(tmp_path / "a.png") as ade:
        # cityscapesScripts/helpers/labels.py: road 7, sidewalk 8, bicycle 33
        assert (city.mode, np.asarray(city).tolist()) == ("L", [[7, 8, 33]])
        assert (ade.mode, np.asarray(ade).tolist()) == ("L", [[1, 150]])


def test_other_classes_are_not_submitted(
    predict: Callable[..., Path], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_other_classes("ade20k", ADE20K_NAMES)
    refuse_other_classes("cityscapes", CITYSCAPES_NAMES)
    with pytest.raises(SystemExit):
        predict(images, options=("--submission", "cityscapes"))
    assert "needs its 19 classes" in capsys.readouterr().err


def test_results_of_an_earlier_run_are_no_images(
    predict: Callable[..., Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for said in ("4 written", "0 written, 4 done before"):
        predict(".", options=("--overlays", "--output", tmp_path))
        assert said in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.png"))) == 3 + 2 * 4


def test_image_is_not_overwritten_by_its_mask(
    predict: Callable[..., Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "masks").mkdir()
    picture = (images / "a.png").rename(tmp_path / "masks/a.png")
    before = picture.read_bytes()
    with pytest.raises(SystemExit):
        predict(picture, options=("--output", tmp_path))
    assert "would be overwritten by its own mask" in capsys.readouterr().err
    assert picture.read_bytes() == before
