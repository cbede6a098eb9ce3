"""The two further decoders as ONNX files, run by onnxruntime."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seglab.models.heads import BiFPNHead, RSPHead

CHANNELS = (4, 6, 8, 10)
HEADS: dict[str, Any] = {
    "bifpn": partial(BiFPNHead, channels=8, repeats=1, levels=(2, 7), head_repeats=1),
    "rsp": partial(RSPHead, channels=16, key_channels=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_onnx_file_computes_the_same(name: str, tmp_path: Path) -> None:
    import onnx

    head = build(name)
    features = levels_of(37, 50)  # sides that do not halve evenly
    path = tmp_path / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(head, (features,), path, dynamo=True, verbose=False)
    require_equal(path, head, features)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds  # folded into the convolutions


def require_equal(path: Path, head: nn.Module, features: list[Tensor]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    feed = {key: x.numpy() for key, x in zip(names, features, strict=True)}
    (found,) = session.run(None, feed)
    np.testing.assert_allclose(found, head(features).numpy(), rtol=1e-3, atol=1e-5)


def levels_of(height: int, width: int) -> list[Tensor]:
    """Features of an image of 4 height x 4 width, halved by rounding up."""
    return [
        torch.randn(1, c, -(-height // 2**i), -(-width // 2**i)) for i, c in enumerate(CHANNELS)
    ]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    head = HEADS[name](CHANNELS, 5).eval().requires_grad_(False)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return head


def open_sizes(stride: int) -> Any:
    """P2 has `stride` * (h, w) pixels, every level above half of the one below."""
    h, w = torch.export.Dim("h", min=1), torch.export.Dim("w", min=1)
    return {"features": [{2: (stride >> i) * h, 3: (stride >> i) * w} for i in range(4)]}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stride"), [("bifpn", 32), ("rsp", 8)])
def test_onnx_file_with_open_sizes_computes_the_same(
    name: str, stride: int, tmp_path: Path
) -> None:
    head, path = build(name), tmp_path / "open.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            head, (levels_of(2 * stride, 3 * stride),), path, dynamo=True, verbose=False,
            dynamic_shapes=open_sizes(stride),
        )  # fmt: skip
    for rows, columns in ((2, 3), (1, 1), (5, 2)):
        require_equal(path, head, levels_of(rows * stride, columns * stride))


def test_open_sizes_that_do_not_divide_are_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"P2 to P7 .* multiples of 128: dynamic_shapes=.* 128 \*"):
        torch.export.export(
            build("bifpn"), (levels_of(64, 96),), dynamic_shapes=open_sizes(16), strict=False
        )
