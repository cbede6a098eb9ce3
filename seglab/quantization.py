"""Quantize exported files to 8-bit integers, for the CPU, on images of the training set.

ONNX Runtime's static quantization writes QuantizeLinear and DequantizeLinear around convolutions
and matrix products, weights per channel; OpenVINO's is NNCF's. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

QUANTIZES: Mapping[str, tuple[str, ...]] = {"onnx": ("sympy",), "openvino": ("nncf",)}
"""Formats that can be quantized, and packages that this needs."""


def quantize(
    path: Path, images: Sequence[Tensor], size: tuple[int, int] | None, is_deep: bool
) -> None:
    """Quantize a file in its place.

    Args:
        path: ONNX or OpenVINO, from `image` to `logits`.
        images: (C, h, w) as evaluation shows them to the network.
        size: Height and width to resize them to; None leaves them as they are.
        is_deep: Whether the file takes float32 and not uint8.
    """
    feed = [_as_input(image, size, is_deep) for image in images]
    (_quantize_onnx if path.suffix == ".onnx" else _quantize_openvino)(path, feed)


def _as_input(image: Tensor, size: tuple[int, int] | None, is_deep: bool) -> Tensor:
    batch = image[None].float()
    if size is not None:
        batch = nn.functional.interpolate(batch, size=size, mode="bilinear")
    return batch if is_deep else batch.round().to(torch.uint8)


def _quantize_onnx(path: Path, feed: Sequence[Tensor]) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, quantized = path.with_name("prepared.onnx"), path.with_name("quantized.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(quantized),
        _Reader(feed),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    quantized.replace(path)
    prepared.unlink()


class _Reader:
    """Images one by one, as ONNX Runtime's calibration asks for them."""

    def __init__(self, feed: Sequence[Tensor]) -> None:
        self.rest = iter(feed)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.rest, None)
        return None if image is None else {"image": image.numpy()}


def _quantize_openvino(path: Path, feed: Sequence[Tensor]) -> None:
    import nncf
    import openvino

    model = openvino.Core().read_model(path)
    data = nncf.Dataset([image.numpy() for image in feed])
    quantized = nncf.quantize(model, data, subset_size=len(feed))
    other = path.with_name("quantized.xml")
    openvino.save_model(quantized, other, compress_to_fp16=False)
    del model, quantized  # they map the file of weights
    for suffix in (".bin", ".xml"):
        other.with_suffix(suffix).replace(path.with_suffix(suffix))
