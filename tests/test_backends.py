"""Exported files and other runtimes under the same predictor: their ids agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seglab
from seglab import exported_scores, runtimes
from seglab.export import ExportError, export_network
from seglab.operators.free_pooling import FreeAdaptiveAvgPool2d, free_grids_
from seglab.runtimes import open_file, read_metadata

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (32, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(fitted: Path) -> Path:
    return fitted / "checkpoints/last.ckpt"


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d((2, 3))

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image.float() / 255)
        return x + nn.functional.interpolate(self.pool(x), x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("grid", [(2, 3), (6, 6), (1, 4), (5, None)])
def test_free_pooling_equals_means_by_hand(grid: tuple[int, int | None]) -> None:
    x = RNG.normal(size=(1, 2, 13, 8))
    rows, columns = grid[0], grid[1] or 8
    expected = np.empty((1, 2, rows, columns))
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * 13 // rows, -(-(i + 1) * 13 // rows)
            left, right = j * 8 // columns, -(-(j + 1) * 8 // columns)
            expected[:, :, i, j] = x[:, :, top:bottom, left:right].mean((2, 3))
    found = FreeAdaptiveAvgPool2d(grid)(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    alone = FreeAdaptiveAvgPool2d(grid)(torch.from_numpy(x[0]))
    np.testing.assert_allclose(alone.numpy(), expected[0], rtol=1e-12)


def test_pooling_to_one_cell_stays_torchs() -> None:
    network = free_grids_(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(2)))
    assert [type(module) for module in network] == [nn.AdaptiveAvgPool2d, FreeAdaptiveAvgPool2d]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch_export"])
def test_size_stays_free_where_a_grid_is_pooled(kind: str, tmp_path: Path) -> None:
    network = Pooled()
    suffix = {"onnx": ".onnx", "openvino": ".xml", "torch_export": ".pt2"}[kind]
    path = tmp_path / f"a{suffix}"
    done = export_network(network, path, kind)  # type: ignore[arg-type]
    assert done.n_images == 6  # of three sizes
    image = torch.randint(0, 256, (2, 3, 31, 47), dtype=torch.uint8)
    if kind == "torch_export":
        found = torch.export.load(path).module()(image).detach().numpy()
    else:
        found = open_file(path, {"onnx": "onnxruntime", "openvino": "openvino"}[kind])(image)
    np.testing.assert_allclose(found, network(image).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_openvino_file_gives_the_checkpoints_ids(
    checkpoint: Path, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new/a.xml"
    args = ("--ckpt_path", checkpoint, "--format", "openvino", "--output", path)
    run("export", *args, "--check_data")
    text = capsys.readouterr().out
    assert "equal to the network" in text
    assert "loses 0.00" in text
    assert sorted(item.name for item in path.parent.iterdir()) == ["a.bin", "a.xml"]
    model, other = seglab.load(checkpoint, device="cpu"), seglab.load(path)
    assert other.class_names == model.class_names
    assert np.array_equal(other.palette, model.palette)
    for image in (IMAGE, IMAGE[:29, :51]):
        assert (other.predict(image) == model.predict(image)).mean() > 0.999
        np.testing.assert_allclose(
            other.predict(image, probabilities=True),
            model.predict(image, probabilities=True),
            atol=1e-4,
        )
    noted = read_metadata(path)
    assert noted["scores"]["loss"] == pytest.approx(0, abs=1e-4)
    assert noted["int8"] is False


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_backend_gives_the_checkpoints_ids(checkpoint: Path, backend: str) -> None:
    model = seglab.load(checkpoint, device="cpu")
    other = seglab.load(checkpoint, backend=backend)  # type: ignore[arg-type]
    for image in (IMAGE, IMAGE[:, :32]):
        assert (other.predict(image) == model.predict(image)).mean() > 0.999


def test_lower_precision_of_torch_is_that_of_autocast(checkpoint: Path) -> None:
    plain = seglab.load(checkpoint, device="cpu")
    half = seglab.load(checkpoint, device="cpu", precision="bf16-mixed")
    found = half.predict(IMAGE, probabilities=True)
    image = torch.from_numpy(IMAGE).permute(2, 0, 1)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain.task.network(image).float().softmax(1)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.array_equal(found, plain.predict(IMAGE, probabilities=True))
    assert np.abs(found - plain.predict(IMAGE, probabilities=True)).max() < 0.1
    assert (half.predict(IMAGE) == plain.predict(IMAGE)).mean() > 0.9


@pytest.mark.slow
def test_lower_precision_of_openvino_is_used_or_refused(checkpoint: Path) -> None:
    plain = seglab.load(checkpoint, device="cpu")
    try:
        half = seglab.load(checkpoint, backend="openvino", precision="bf16-mixed")
    except ValueError as error:
        assert "this processor computes in f32 instead" in str(error)  # noqa: PT017
        return
    found = half.predict(IMAGE, probabilities=True)
    expected = plain.predict(IMAGE, probabilities=True)
    assert 1e-5 < np.abs(found - expected).max() < 0.1


def test_missing_arithmetic_is_told_before_the_first_image(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino")

    class Core:
        def compile_model(self, *_: object) -> Any:
            return SimpleNamespace(get_property=lambda name: openvino.Type.f32)

    monkeypatch.setattr(openvino, "Core", Core)
    with pytest.raises(ValueError, match="'bf16-mixed': this processor computes in f32 instead"):
        seglab.load(checkpoint, backend="openvino", precision="bf16-mixed")


def test_precision_wins_over_that_of_the_training(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["model"]["eval_precision"] = "32"
    torch.save(content, tmp_path / "a.ckpt")
    model = seglab.load(tmp_path / "a.ckpt", device="cpu", precision="bf16-mixed")
    types = []
    model.task.network.encoder.register_forward_hook(
        lambda module, given, maps: types.append(maps[-1].dtype)
    )
    model.predict(IMAGE)
    model.predict(IMAGE, probabilities=True)
    assert types == [torch.bfloat16] * 2


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:99"])
def test_device_that_is_not_there_is_one_sentence(checkpoint: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device {device} cannot be used here .*: give cpu"):
        seglab.load(checkpoint, device=device)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "bf16"}, "computes in 32-true or 16-mixed or bf16-mixed"),
        ({"precision": "bf16-mixed", "backend": "onnxruntime"}, "onnxruntime computes in 32-true"),
        ({"precision": "16-mixed", "backend": "openvino"}, "in 32-true or bf16-mixed"),
        ({"precision": "bf16-mixed", "optimize": True}, "leave one of the two out"),
    ],
)
def test_precision_that_nothing_computes_in_is_refused(
    checkpoint: Path, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        seglab.load(checkpoint, device="cpu", **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_int8_file_says_its_loss_and_gain(
    kind: str,
    checkpoint: Path,
    run: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("nncf" if kind == "openvino" else "onnxruntime")
    path = tmp_path / {"onnx": "a.onnx", "openvino": "a.xml"}[kind]
    args = ("--ckpt_path", checkpoint, "--format", kind, "--output", path, "--size", "32,32")
    run("export", *args, "--int8", "--n_calibration", 4)
    said = capsys.readouterr().out
    assert f"{path}: before quantization equal to the network" in said
    assert "int8: mIoU on" in said
    noted = read_metadata(path)
    assert noted["int8"] is True
    scores = noted["scores"]
    assert scores["loss"] == pytest.approx(scores["network_miou"] - scores["file_miou"])
    assert scores["gain"] > 0
    if kind == "onnx":
        import onnx

        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert kinds.count("DequantizeLinear") > kinds.count("Conv") > 0
    assert seglab.load(path).predict(IMAGE[:, :32]).shape == (32, 32)


def test_size_that_the_data_lacks_is_told_first(
    checkpoint: Path, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--ckpt_path", checkpoint, "--output", tmp_path / "a.onnx", "--size", "32,64")
    with pytest.raises(SystemExit):
        run("export", *args, "--check_data")
    message = capsys.readouterr().err
    assert "validation images are (32, 32) pixels and --size is (32, 64)" in message
    assert list(tmp_path.iterdir()) == []


def test_file_with_another_miou_is_not_kept() -> None:
    scores = exported_scores.Scores(3, 0.5, 0.4998, 1.0)
    with pytest.raises(ExportError, match=r"mIoU on 3 validation images is 0\.49980"):
        exported_scores.refuse_loss(scores, Path("a.onnx"))
    exported_scores.refuse_loss(exported_scores.Scores(3, 0.5, 0.49995, 1.0), Path("a.onnx"))


@pytest.mark.slow
def test_optimized_checkpoint_gives_equal_ids(
    checkpoint: Path, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    model = seglab.load(checkpoint, device="cpu")
    faster = seglab.load(checkpoint, device="cpu", optimize=True)
    assert faster.optimizations is None  # the first image decides
    expected = model.predict(IMAGE, probabilities=True)
    np.testing.assert_allclose(faster.predict(IMAGE, probabilities=True), expected, atol=1e-4)
    assert faster.optimizations is not None
    assert faster.optimizations.folding.n_norms > 0
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    args = ("--ckpt_path", checkpoint, "--input", tmp_path / "a.png", "--device", "cpu")
    run("predict", *args, "--output", tmp_path / "out", "--optimize")
    assert "optimized: " in capsys.readouterr().out
    ids = np.asarray(Image.open(tmp_path / "out/masks/a.png"))
    assert (ids == model.predict(IMAGE)).mean() > 0.999


def test_other_backends_refuse_what_they_cannot(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="optimize changes torch's network"):
        seglab.load(checkpoint, backend="openvino", optimize=True)
    with pytest.raises(ValueError, match="run on the CPU"):
        seglab.load(checkpoint, device="cuda", backend="onnxruntime")
    with pytest.raises(ValueError, match="'tensorrt': give one of torch, onnxruntime, openvino"):
        seglab.load(checkpoint, backend="tensorrt")  # type: ignore[arg-type]
    (tmp_path / "a.xml").write_text("<net/>")
    with pytest.raises(ValueError, match="cannot be run by backend 'torch'"):
        seglab.load(tmp_path / "a.xml", backend="torch")
    with pytest.raises(FileNotFoundError, match="check the path"):
        seglab.load(tmp_path / "b.onnx")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'openvino' is not installed: pip install openvino"):
        seglab.load(checkpoint, backend="openvino")


@pytest.mark.slow
def test_file_refuses_other_sizes_and_strangers(tmp_path: Path) -> None:
    noted = {
        "class_names": list("abcd"),
        "palette": [[0, 0, 0]] * 4,
        "ignore_index": 255,
        "image": {"size": [16, 24], "channels": 3, "value_range": None},
        "evaluation": {
            "crop_size": None, "stride": None, "scales": [1.0], "flip": False,
            "blend": "uniform", "eval_scale": None,
        },
    }  # fmt: skip
    path = tmp_path / "a.onnx"
    export_network(Pooled(), path, "onnx", size=(16, 24), metadata=noted)
    model = seglab.load(path)
    assert model.predict(IMAGE[:16, :24]).shape == (16, 24)
    with pytest.raises(ValueError, match=r"images of \(16, 24\) pixels and got \(32, 64\)"):
        model.predict(IMAGE)
    export_network(Pooled(), path, "onnx", size=(16, 24), metadata={"name": "x"})
    with pytest.raises(ValueError, match="takes files written by `export`"):
        seglab.load(path)
