"""The served page: what an upload answers, what is refused, and that the page needs no network."""

from __future__ import annotations

import base64
import importlib.util
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from web_pages import parse

testclient = pytest.importorskip("fastapi.testclient", reason="fastapi and httpx2: [dev]")
ROOT = Path(__file__).parents[2]


def example() -> Any:
    spec = importlib.util.spec_from_file_location("serve", ROOT / "examples" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(fitted: Path) -> Any:
    import seglab

    return seglab.load(fitted / "checkpoints/last.ckpt", device="cpu")


@pytest.fixture(scope="module")
def client(model: Any) -> Any:
    return testclient.TestClient(example().create_app(model, max_bytes=50_000, max_pixels=10_000))


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_answer_is_what_the_model_predicts(client: Any, model: Any, scene: np.ndarray) -> None:
    answer = client.post("/predict", params={"name": "a/scene.png"}, content=encoded(scene))
    assert answer.status_code == 200
    found = answer.json()
    ids = model.predict(scene)
    assert (found["name"], found["width"], found["height"]) == ("scene.png", 60, 40)
    np.testing.assert_array_equal(np.asarray(decoded(found["mask"])), ids)
    colors = np.asarray(decoded(found["layer"]).convert("RGB"))
    np.testing.assert_array_equal(colors, model.palette[ids])
    expected = {model.class_names[k]: (ids == k).mean() for k in np.unique(ids)}
    assert {row["name"]: row["share"] for row in found["shares"]} == pytest.approx(expected)
    assert [row["share"] for row in found["shares"]] == sorted(expected.values(), reverse=True)


def test_photograph_is_turned_as_its_exif_says(client: Any, scene: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(scene, "JPEG", exif=exif.tobytes())
    found = client.post("/predict?name=phone.JPG", content=content).json()
    assert (found["width"], found["height"]) == (40, 60)
    assert decoded(found["picture"]).size == (40, 60)


@pytest.mark.parametrize(
    ("name", "content", "status", "words"),
    [
        ("notes.txt", b"hello", 415, "notes.txt is not named like an image"),
        ("none", b"hello", 415, "not named like an image"),
        ("empty.png", b"", 400, "empty.png is empty"),
        ("broken.png", b"hello", 422, "broken.png"),
        ("broken.tif", b"II*\0hello", 422, "broken.tif"),
        ("broken.npy", b"\x93NUMPY", 422, "broken.npy"),
        ("long.png", b"x" * 50_001, 413, "larger than the 0.05 MB"),
        ("wide.png", encoded(np.zeros((1, 10_001), np.uint8)), 413, "10001 x 1 pixels"),
        ("cut.png", encoded(np.zeros((50, 50, 3), np.uint8))[:-20], 422, "cut.png"),
        ("deep.png", encoded(np.zeros((9, 9), np.uint16)), 422, "data.value_range"),
    ],
)
def test_what_cannot_be_labelled_is_refused(
    client: Any, name: str, content: bytes, status: int, words: str
) -> None:
    answer = client.post("/predict", params={"name": name}, content=content)
    assert answer.status_code == status
    assert words in answer.json()["detail"]
    assert "/tmp" not in answer.json()["detail"]


def test_picture_of_too_many_pixels_is_not_decoded(client: Any) -> None:
    content = bytearray(encoded(np.zeros((1, 1), np.uint8)))
    content[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's width and height
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    answer = client.post("/predict?name=bomb.png", content=bytes(content))
    assert (answer.status_code, "pixels" in answer.json()["detail"]) == (413, True)


def test_upload_without_a_length_is_cut_off(client: Any) -> None:
    n_sent = 0

    def parts() -> Any:
        nonlocal n_sent
        for _ in range(1000):
            n_sent += 1
            yield b"x" * 1000

    assert client.post("/predict?name=a.png", content=parts()).status_code == 413


def test_model_says_its_classes(client: Any, model: Any) -> None:
    about = client.get("/model").json()
    assert [entry["name"] for entry in about["classes"]] == list(model.class_names)
    color = tuple(int(about["classes"][1]["color"][i : i + 2], 16) for i in (1, 3, 5))
    assert color == tuple(model.palette[1])


def test_page_is_whole_and_needs_no_network(client: Any) -> None:
    page = parse(client.get("/").text)
    assert page.faults == []
    assert page.external == []
    assert page.count("input") == 2
