"""The two further decoders as ONNX files, run by onnxruntime."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from seglab.models.heads import BiFPNHead, RSPHead

CHANNELS = (4, 6, 8, 10)
HEADS: dict[str, Any] = {
    "bifpn": partial(BiFPNHead, channels=8, repeats=1, levels=(2, 7), head_repeats=1),
    "rsp": partial(RSPHead, channels=16, key_channels=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_onnx_file_computes_the_same(name: str, tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    head = HEADS[name](CHANNELS, 5).eval().requires_grad_(False)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    # Sides that do not halve evenly.
    features = [torch.randn(1, c, -(-37 // 2**i), -(-50 // 2**i)) for i, c in enumerate(CHANNELS)]
    path = tmp_path / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(head, (features,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    feed = {key: x.numpy() for key, x in zip(names, features, strict=True)}
    (found,) = session.run(None, feed)
    np.testing.assert_allclose(found, head(features).numpy(), rtol=1e-3, atol=1e-5)
