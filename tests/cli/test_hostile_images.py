"""Files that nobody meant to predict: each has a defined result, and none stops the others."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import seglab

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


def jpeg(**options: object) -> bytes:
    file = io.BytesIO()
    smooth = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)
    mode = options.pop("mode", "RGB")
    Image.fromarray(smooth).convert(str(mode)).save(file, "JPEG", **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def save_pages(path: Path) -> None:
    tifffile.imwrite(path, np.stack([PIXELS, PIXELS]), photometric="rgb")


def save_animation(path: Path) -> None:
    frames = [Image.fromarray(PIXELS[::-1]), Image.fromarray(PIXELS)]
    Image.fromarray(PIXELS).save(path, save_all=True, append_images=frames)


def save_transparent_palette(path: Path) -> None:
    Image.fromarray(PIXELS).quantize(16).save(path, transparency=3)


def save_opaque_palette(path: Path) -> None:
    Image.fromarray(PIXELS).quantize(16).save(path, transparency=bytes([255] * 16))


def save_transparent_grey(path: Path) -> None:
    Image.fromarray(PIXELS[..., 0]).save(path, transparency=int(PIXELS[0, 0, 0]))


def save_cut_giant(path: Path) -> None:
    Image.new("1", (30_000, 20_000)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


LABELLED: dict[str, tuple[Callable[[Path], object], tuple[int, int]]] = {
    "grey.png": (lambda p: Image.new("L", (6, 4)).save(p), (4, 6)),
    "opaque.png": (lambda p: Image.new("RGBA", (6, 4), (1, 2, 3, 255)).save(p), (4, 6)),
    "palette.png": (save_opaque_palette, (20, 30)),
    "pixel.png": (lambda p: Image.new("RGB", (1, 1)).save(p), (1, 1)),
    "wide.png": (lambda p: Image.new("RGB", (30_000, 2)).save(p), (2, 30_000)),
    "cmyk.jpg": (lambda p: p.write_bytes(jpeg(mode="CMYK")), (20, 30)),
    "turned.jpg": (lambda p: p.write_bytes(jpeg(exif=turned())), (30, 20)),
    "moving.webp": (save_animation, (20, 30)),
    "moving.png": (save_animation, (20, 30)),
    "a name\nof two lines.png": (lambda p: Image.new("RGB", (6, 4)).save(p), (4, 6)),
}
"""How each is made, and the size of its mask."""

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut.jpg": (lambda p: p.write_bytes(jpeg()[:400]), "cut short"),
    "giant.png": (save_cut_giant, "cut short"),
    "empty.png": (lambda p: p.write_bytes(b""), "0 bytes"),
    "empty.tif": (lambda p: p.write_bytes(b""), "cannot decode"),
    "empty.npy": (lambda p: p.write_bytes(b""), "cannot read"),
    "text.png": (lambda p: p.write_text("no image"), "cannot decode"),
    "deep.png": (
        lambda p: Image.fromarray(PIXELS[..., 0].astype(np.uint16)).save(p),
        "value_range",
    ),
    "clear.png": (lambda p: Image.new("RGBA", (4, 4)).save(p), "drop_alpha"),
    "clear palette.png": (save_transparent_palette, "drop_alpha"),
    "clear grey.png": (save_transparent_grey, "drop_alpha"),
    "pages.tif": (save_pages, "one image of bands per file"),
    "bands.npy": (lambda p: np.save(p, PIXELS[..., :2]), r"has 2 band\(s\)"),
    "nan.npy": (lambda p: np.save(p, np.full((4, 4), np.nan)), "no finite number"),
    "real.tif": (lambda p: tifffile.imwrite(p, PIXELS[..., 0] / 255), "value_range"),
    "no pixels.npy": (lambda p: np.save(p, PIXELS[:0]), r"shape \(0, 30, 3\)"),
    "letters.npy": (lambda p: np.save(p, np.array([["a"]])), "<U1 values"),
    "complex.npy": (lambda p: np.save(p, np.ones((4, 4), complex)), "complex128 values"),
    "folder.png": (lambda p: p.mkdir(), "[Ii]s a directory|a folder"),
}
"""How each is made, and what is said of it."""


@pytest.fixture(scope="module")
def model(fitted: Path) -> seglab.predictor.Predictor:
    return seglab.load(fitted / "checkpoints/last.ckpt", device="cpu")


@pytest.mark.parametrize("name", LABELLED)
def test_unusual_image_is_labelled_at_its_size(
    name: str, tmp_path: Path, model: seglab.predictor.Predictor
) -> None:
    make, size = LABELLED[name]
    make(tmp_path / name)
    assert model.predict(tmp_path / name).shape == size


@pytest.mark.parametrize("name", REFUSED)
def test_unfit_image_is_told_in_one_sentence(
    name: str, tmp_path: Path, model: seglab.predictor.Predictor
) -> None:
    make, match = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=match):
        model.predict(tmp_path / name)


def test_first_picture_of_an_animation_is_taken(
    tmp_path: Path, model: seglab.predictor.Predictor
) -> None:
    save_animation(tmp_path / "moving.png")
    assert (model.read(tmp_path / "moving.png") == PIXELS).all()
    with Image.open(tmp_path / "moving.png") as opened:
        assert (model.read(opened) == PIXELS).all()


@pytest.mark.parametrize("save", [save_transparent_palette, save_transparent_grey])
def test_transparent_colours_are_seen_in_memory_too(
    save: Callable[[Path], None], tmp_path: Path, model: seglab.predictor.Predictor
) -> None:
    save(tmp_path / "a.png")
    with (
        Image.open(tmp_path / "a.png") as opened,
        pytest.raises(ValueError, match="drop_alpha"),
    ):
        model.predict(opened)


def test_cmyk_has_the_colours_that_pillow_gives(
    tmp_path: Path, model: seglab.predictor.Predictor
) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(mode="CMYK", quality=95))
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = np.asarray(opened.convert("RGB")).astype(int)
    assert np.abs(model.read(tmp_path / "a.jpg") - expected).mean() < 3


@pytest.fixture
def predict(run: Callable[..., None], fitted: Path, tmp_path: Path) -> Callable[..., Path]:
    def predict(*inputs: object, options: tuple[object, ...] = ()) -> Path:
        output = tmp_path / "out"
        base = ("--ckpt_path", fitted / "checkpoints/last.ckpt", "--output", output)
        run("predict", *base, "--device", "cpu", *options, "--input", *inputs)
        return output

    return predict


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A folder with all of them, an unreadable file, a pipe, and a link to nowhere."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, (make, _) in {**LABELLED, **REFUSED}.items():
        suffix = Path(name).suffix
        make(folder / f"{Path(name).stem}_{suffix[1:]}{suffix}")
    os.mkfifo(folder / "pipe.png")
    (folder / "nowhere.png").symlink_to(folder / "none.png")
    return folder


def test_no_file_stops_a_folder(
    predict: Callable[..., Path],
    zoo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(PIXELS).save(zoo / "secret.png")
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:  # root may read everything
        if path.name == "secret.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SystemExit) as stop:
        predict(zoo)
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert f"{len(LABELLED)} written" in said
    assert f"{len(REFUSED) + 3} could not be predicted:" in said
    lines = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(lines) == len(REFUSED) + 3
    for name in ("secret.png: cannot read", "pipe.png: ", "nowhere.png: ", "cut_jpg.jpg: "):
        assert sum(name in line for line in lines) == 1
    masks = zoo.parent / "out/masks"
    assert len(list(masks.iterdir())) == len(LABELLED)
    with pytest.raises(SystemExit):  # and again: what is done is done
        predict(zoo)
    assert f"0 written, {len(LABELLED)} done before" in capsys.readouterr().out


def test_image_beyond_the_network_or_memory_is_listed(
    predict: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One that does not fit takes none of its batch along."""
    from seglab.predictor import Predictor

    folder = tmp_path / "zoo"
    folder.mkdir()
    for name, size in (("a", 20), ("b", 300), ("c", 20), ("d", 2)):
        Image.new("RGB", (size, size)).save(folder / f"{name}.png")
    label = Predictor.label

    def limited(self: Predictor, images: list[np.ndarray]) -> list[np.ndarray]:
        for pixels in images:
            if len(pixels) == 300:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            if len(pixels) == 2:
                raise RuntimeError("Kernel size can't be greater than actual input size")
        return label(self, images)

    monkeypatch.setattr(Predictor, "label", limited)
    with pytest.raises(SystemExit):
        predict(folder)
    said = capsys.readouterr().out
    assert "2 written" in said
    assert "b.png: it needs more memory than there is" in said
    assert "--window 1024,1024" in said
    assert "d.png: Kernel size" in said


def test_names_that_no_terminal_can_print_are_listed(
    predict: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = os.fsdecode(b"\xff\xfe.png")
    (tmp_path / strange).write_bytes(b"")
    Image.fromarray(PIXELS).save(tmp_path / os.fsdecode(b"\xff.png"))
    with pytest.raises(SystemExit):
        predict(tmp_path)
    said = capsys.readouterr().out
    assert "1 written" in said
    assert "\\udcff\\udcfe.png" in said


def test_mask_name_that_is_too_long_is_listed(
    predict: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / f"{'x' * 250}.png")
    Image.fromarray(PIXELS).save(tmp_path / "short.png")
    with pytest.raises(SystemExit):
        predict(tmp_path)
    said = capsys.readouterr().out
    assert "1 written" in said
    assert "File name too long" in said


def test_lists_may_hold_anything(
    predict: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "an image.png")
    lines = [str(tmp_path / "an image.png"), "none.png", "y" * 5000, "   ", str(tmp_path)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    with pytest.raises(SystemExit):
        predict("-")
    said = capsys.readouterr().out
    assert "1 written" in said
    assert "3 could not be predicted" in said
