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

from seglab.models import Segmenter, TimmEncoder
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
    export(head, features, path)
    require_equal(path, head, features)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "Conv" in kinds
    assert "BatchNormalization" not in kinds  # folded into the convolutions


def require_equal(path: Path, network: nn.Module, inputs: Any) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    tensors = inputs if isinstance(inputs, list) else [inputs]
    feed = {key: x.numpy() for key, x in zip(names, tensors, strict=True)}
    (found,) = session.run(None, feed)
    expected = network(inputs).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def levels_of(height: int, width: int) -> list[Tensor]:
    """Features of an image of 4 height x 4 width, halved by rounding up."""
    return [
        torch.randn(1, c, -(-height // 2**i), -(-width // 2**i)) for i, c in enumerate(CHANNELS)
    ]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return frozen(HEADS[name](CHANNELS, 5))


def frozen(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval().requires_grad_(False)


def open_sizes(stride: int) -> Any:
    """P2 has `stride` * (h, w) pixels, every level above half of the one below."""
    h, w = torch.export.Dim("h", min=1), torch.export.Dim("w", min=1)
    return {"features": [{2: (stride >> i) * h, 3: (stride >> i) * w} for i in range(4)]}


def export(network: nn.Module, example: Any, path: Path, dynamic_shapes: Any = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            network, (example,), path, dynamo=True, verbose=False, dynamic_shapes=dynamic_shapes
        )


@pytest.mark.slow
def test_bifpn_with_open_sizes_takes_multiples_of_its_stride(tmp_path: Path) -> None:
    head, path = build("bifpn"), tmp_path / "open.onnx"
    export(head, levels_of(64, 96), path, open_sizes(32))
    for rows, columns in ((2, 3), (1, 1), (5, 2)):
        require_equal(path, head, levels_of(rows * 32, columns * 32))


@pytest.mark.slow
def test_rsp_with_open_sizes_takes_any_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = frozen(Segmenter(TimmEncoder("test_resnet"), HEADS["rsp"], num_classes=5))
    h, w = (torch.export.Dim(name, min=64, max=4096) for name in "hw")
    draw = partial(torch.randint, 0, 256, dtype=torch.uint8)
    export(network, draw((1, 3, 97, 129)), tmp_path / "any.onnx", {"image": {2: h, 3: w}})
    for size in ((97, 129), (64, 64), (100, 101), (131, 200)):
        require_equal(tmp_path / "any.onnx", network, draw((1, 3, *size)))


def test_open_sizes_that_do_not_divide_are_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"P2 to P7 .* multiples of 128: dynamic_shapes=.* 128 \*"):
        torch.export.export(
            build("bifpn"), (levels_of(64, 96),), dynamic_shapes=open_sizes(16), strict=False
        )
