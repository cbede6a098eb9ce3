"""Run exported files on the CPU: ONNX Runtime and OpenVINO, on torch's threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Backend = Literal["torch", "onnxruntime", "openvino"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed"]
"""Words of Lightning's Trainer."""
Run = Callable[[Tensor], NDArray[Any]]

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": (".onnx",),
    "openvino": (".xml", ".onnx"),
}
"""Files that each runtime reads, its own kind first."""


def is_exported(path: str | Path) -> bool:
    """Whether a file is named as an exported network that a runtime reads."""
    return any(Path(path).suffix.lower() in suffixes for suffixes in SUFFIXES.values())


def backend_of(path: Path, backend: str | None) -> str:
    """The runtime for an exported file, its own if none is asked for.

    Raises:
        ValueError: The runtime does not read such files, or is not installed.
    """
    readers = [name for name, suffixes in SUFFIXES.items() if path.suffix.lower() in suffixes]
    if backend is not None and backend not in readers:
        raise ValueError(
            f"{path} cannot be run by backend {backend!r}: choose {' or '.join(readers)}, or give"
            " the checkpoint"
        )
    refuse_missing_runtime(chosen := backend or readers[0])
    return chosen


def refuse_missing_runtime(backend: str) -> None:
    """Raise ValueError if there is no such runtime, or it is not installed."""
    if backend not in SUFFIXES:
        raise ValueError(f"backend {backend!r}: give one of torch, {', '.join(SUFFIXES)}")
    if find_spec(backend) is None:
        raise ValueError(
            f"backend {backend!r} is not installed: pip install {backend} (the extra"
            " seglab[export] has it)"
        )


def refuse_precision(backend: str, precision: str) -> None:
    """Raise ValueError if a backend, on this processor, cannot compute so."""
    able = {"torch": get_args(Precision), "openvino": ("32-true", "bf16-mixed")}
    choices = able.get(backend, ("32-true",))
    if precision not in choices:
        raise ValueError(
            f"precision {precision!r}: backend {backend} computes in {' or '.join(choices)}"
        )
    if backend == "openvino" and precision != choices[0]:  # now, and not at the first image
        import openvino
        from openvino import opset13

        image = opset13.parameter([1])
        compile_openvino(openvino.Model([opset13.relu(image)], [image]), precision)


def open_file(path: Path, backend: str, precision: str = "32-true") -> Run:
    """Read an exported file; returns what maps an image (B, C, H, W) to logits."""
    if backend == "onnxruntime":
        return _open_onnxruntime(path)
    return compile_openvino(path, precision)


def _open_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: np.asarray(session.run(None, {"image": image.numpy()})[0])


def compile_openvino(model: Any, precision: str = "32-true") -> Run:
    """Compile a file, or a model that OpenVINO holds.

    Left alone it computes in bfloat16 on processors that can, which differs in the third digit.

    Raises:
        ValueError: The processor has no arithmetic in bfloat16, and it is asked for.
    """
    import openvino

    kind = {"32-true": "f32", "bf16-mixed": "bf16"}[precision]
    hints = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", hints)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if used != kind:
        raise ValueError(f"precision {precision!r}: this processor computes in {used} instead")
    return lambda image: np.array(compiled({0: image.numpy()})[0])


def read_metadata(path: Path) -> dict[str, Any]:
    """What `export` wrote into a file about its classes, images and evaluation.

    Raises:
        ValueError: There is nothing of the kind.
    """
    try:
        noted = _noted_in_onnx(path) if path.suffix.lower() == ".onnx" else _noted_in_xml(path)
        found = json.loads(noted)
        if {"class_names", "palette", "image", "evaluation"} <= found.keys():
            return dict(found)
    except (KeyError, json.JSONDecodeError):
        pass
    raise ValueError(
        f"{path} does not say its classes and rule of evaluation: seglab.load takes files written"
        " by `export`"
    )


def _noted_in_onnx(path: Path) -> str:
    import onnx

    model = onnx.load(path, load_external_data=False)
    noted: str = {item.key: item.value for item in model.metadata_props}["seglab"]
    return noted


def _noted_in_xml(path: Path) -> str:
    import openvino

    model = openvino.Core().read_model(path)
    if not model.has_rt_info(["seglab", "all"]):
        raise KeyError("seglab")
    return str(model.get_rt_info(["seglab", "all"]).value)


def annotate(path: Path, metadata: Mapping[str, Any]) -> None:
    """Write metadata into an ONNX or OpenVINO file: as one JSON text, and one text per key."""
    noted = json.dumps(metadata)
    flat = {key: json.dumps(value) for key, value in metadata.items()}
    if path.suffix == ".onnx":
        import onnx

        model = onnx.load(path)
        onnx.helper.set_model_props(model, {"seglab": noted, **flat})
        onnx.save(model, path)
        return
    import openvino

    model = openvino.Core().read_model(path)
    for key, value in {"all": noted, **flat}.items():
        model.set_rt_info(value, ["seglab", key])
    other = path.with_name(f"annotated{path.suffix}")
    openvino.save_model(model, other, compress_to_fp16=False)
    del model  # it maps the file of weights
    for suffix in (".bin", ".xml"):
        other.with_suffix(suffix).replace(path.with_suffix(suffix))
