"""What training leaves behind runs elsewhere: the deployment page's lines for ONNX."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from seglab.models import FusionConv2d
from seglab.task import SegmentationTask

PAGE = Path(__file__).parents[1] / "docs" / "deployment.md"


def page_code(heading: str) -> str:
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return str(code)


@pytest.mark.slow
def test_page_exports_a_checkpoint_to_onnx(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    checkpoint = fitted / "checkpoints/last.ckpt"
    code = page_code("ONNX").replace("best.ckpt", str(checkpoint))
    code = code.replace("512, 512", "32, 64")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        exec(compile(code, "deployment.md", "exec"), {})
    session = onnxruntime.InferenceSession("network.onnx")
    network = SegmentationTask.load_from_checkpoint(checkpoint, map_location="cpu").network.eval()
    image = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = network(image).numpy()
    assert found.shape == (1, 8, 32, 64)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_fused_layers_export_as_ordinary_operations(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    conv = FusionConv2d(12, 4, 3, padding=1, force="fused").requires_grad_(False)
    branches = [torch.randn(1, 4, size, size) for size in (16, 8, 4)]
    path = tmp_path / "fusion.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(conv, (branches,), path, dynamo=True, verbose=False)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"Resize", "Concat", "Conv"} <= kinds
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    feed = {name: x.numpy() for name, x in zip(names, branches, strict=True)}
    (found,) = session.run(None, feed)
    np.testing.assert_allclose(found, conv(branches).numpy(), rtol=1e-4, atol=1e-5)
