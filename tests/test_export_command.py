"""`export` writes files that other runtimes read, and keeps none that computes something else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import seglab
from seglab import export
from seglab.export import ExportError, export_network


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image.float() / 255)


@pytest.fixture(scope="module")
def checkpoint(fitted: Path) -> Path:
    return fitted / "checkpoints/last.ckpt"


@pytest.mark.slow
def test_onnx_file_is_the_network_at_a_fixed_size(
    checkpoint: Path, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    path = tmp_path / "new" / "a.onnx"
    run("export", "--ckpt_path", checkpoint, "--output", path, "--size", "32,64")
    assert "equal to the network on 8 images" in capsys.readouterr().out  # 2 + 1 + 3 and 2 real
    session = onnxruntime.InferenceSession(path)
    model = seglab.load(checkpoint, device="cpu")
    image = torch.randint(0, 256, (5, 3, 32, 64), dtype=torch.uint8)
    (found,) = session.run(["logits"], {"image": image.numpy()})
    with torch.no_grad():
        expected = model.task.network(image).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    noted = json.loads(session.get_modelmeta().custom_metadata_map["seglab"])
    assert tuple(noted["class_names"]) == model.class_names
    assert noted["palette"] == model.palette.tolist()
    assert noted["image"]["size"] == [32, 64]
    assert [item.name for item in path.parent.iterdir()] == ["a.onnx"]


@pytest.mark.slow
def test_onnx_size_and_batch_stay_free(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    network = Toy()
    done = export_network(network, tmp_path / "a.onnx", "onnx")
    assert done.largest_difference < 1e-5
    session = onnxruntime.InferenceSession(done.path)
    for shape in ((1, 3, 5, 9), (4, 3, 64, 33)):
        image = torch.randint(0, 256, shape, dtype=torch.uint8)
        (found,) = session.run(None, {"image": image.numpy()})
        np.testing.assert_allclose(found, network(image).detach().numpy(), atol=1e-4)


def test_program_takes_any_batch_and_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Toy()
    noted = {"class_names": ["a", "b", "ü", "d"]}
    export_network(network, tmp_path / "a.pt2", "torch_export", metadata=noted)
    files = {"seglab.json": ""}
    module = torch.export.load(tmp_path / "a.pt2", extra_files=files).module()
    image = torch.randint(0, 256, (1, 3, 7, 40), dtype=torch.uint8)
    torch.testing.assert_close(module(image), network(image))
    assert json.loads(files["seglab.json"]) == noted


@pytest.mark.slow
def test_program_runs_where_only_torch_is(
    checkpoint: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    path = tmp_path / "a.pt2"
    args = ("--format", "torch_export", "--output", path, "--size", "32,64")
    run("export", "--ckpt_path", checkpoint, *args)
    code = f"""
import sys, torch
sys.modules["seglab"] = sys.modules["scale_equalization"] = None  # importing them fails
files = {{"seglab.json": ""}}
module = torch.export.load({str(path)!r}, extra_files=files).module()
image = torch.arange(4 * 3 * 32 * 64).view(4, 3, 32, 64).remainder(251).to(torch.uint8)
torch.save(module(image), {str(tmp_path / "logits.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    image = torch.arange(4 * 3 * 32 * 64).view(4, 3, 32, 64).remainder(251).to(torch.uint8)
    with torch.no_grad():
        expected = seglab.load(checkpoint, device="cpu").task.network(image)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_size_that_the_network_fixes_is_refused(tmp_path: Path) -> None:
    class Fixed(Toy):
        def forward(self, image: Tensor) -> Tensor:
            logits = super().forward(image)
            return 2 * logits if image.shape[-1] > 330 else logits  # traced at 320

    with pytest.raises(ExportError) as caught:
        export_network(Fixed(), tmp_path / "a.onnx", "onnx")
    assert "size" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_carry_classes_and_come_back_equal(
    checkpoint: Path, run: Callable[..., None], tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    path = tmp_path / "a.safetensors"
    run("export", "--ckpt_path", checkpoint, "--format", "safetensors", "--output", path)
    network = seglab.load(checkpoint, device="cpu").task.network
    state = load_file(path)
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    with safe_open(path, "pt") as file:
        assert len(json.loads(file.metadata()["class_names"])) == 8


def test_real_images_of_a_folder_are_compared(
    checkpoint: Path, run: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (70, 50), (index, 9, 99)).save(tmp_path / f"images/{index}.png")
    args = ("--ckpt_path", checkpoint, "--format", "safetensors")
    run("export", *args, "--output", tmp_path / "a", "--images", tmp_path / "images")
    assert "on 8 images" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["shifted", "cropped", "nan", "crashes"])
def test_file_that_differs_is_not_kept(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {
        "shifted": lambda x: x + 1e-2 * np.abs(x).max(),
        "cropped": lambda x: x[..., 1:],
        "nan": lambda x: x * np.nan,
        "crashes": lambda x: x.no_such_name,
    }
    honest = export._write_program

    def broken(*args: object) -> export.Run:
        run = honest(*args)  # type: ignore[arg-type]
        return lambda image: faults[fault](run(image))

    monkeypatch.setattr(export, "_write_program", broken)
    (tmp_path / "a.pt2").write_text("the former file")
    with pytest.raises(ExportError, match=r"a\.pt2 is not written"):
        export_network(Toy(), tmp_path / "a.pt2", "torch_export")
    assert [item.name for item in tmp_path.iterdir()] == ["a.pt2"]
    assert (tmp_path / "a.pt2").read_text() == "the former file"


def test_missing_package_is_told_in_a_sentence(
    checkpoint: Path,
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with pytest.raises(SystemExit):
        run("export", "--ckpt_path", checkpoint)
    message = capsys.readouterr().err
    assert ": format onnx needs onnxscript: pip install onnxscript" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("size", ["12", "a,b", "0,5"])
def test_unfit_size_is_refused(
    size: str, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("export", "--ckpt_path", "a.ckpt", "--size", size)
    assert repr(size) in capsys.readouterr().err


def test_formats_of_the_command_are_those_of_the_library() -> None:
    from typing import get_args

    from seglab.cli.export import FORMATS

    assert get_args(export.Format) == FORMATS
