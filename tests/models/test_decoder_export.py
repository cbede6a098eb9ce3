"""The two further decoders as ONNX files of dynamic size, run by onnxruntime."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import BiFPNHead, RSPHead

HEADS: dict[str, Any] = {
    "bifpn": partial(BiFPNHead, channels=8, repeats=2),
    "rsp": partial(RSPHead, channels=16, key_channels=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_onnx_file_takes_any_size(name: str, tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    network = Segmenter(TimmEncoder("tf_efficientnet_lite0"), HEADS[name], num_classes=5).eval()
    for module in network.decode_head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    path = tmp_path / f"{name}.onnx"
    image = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    dynamic = {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            network, (image,), path, dynamo=True, verbose=False, dynamic_shapes=(dynamic,)
        )
    session = onnxruntime.InferenceSession(path)
    (value,) = session.get_inputs()
    for size in ((64, 96), (128, 64), (97, 161)):
        image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        (found,) = session.run(None, {value.name: image.numpy()})
        with torch.no_grad():
            expected = network(image).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
