"""`seglab.load`: from a checkpoint or an exported file to a `Predictor`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from seglab.checkpoints import read_checkpoint, refuse_mismatch
from seglab.data.sources.reading import ImageFormat
from seglab.exported import CompiledNetwork, load_exported
from seglab.predictor import Predictor
from seglab.runtimes import (
    Backend,
    Precision,
    is_exported,
    refuse_missing_runtime,
    refuse_precision,
)
from seglab.trained_task import build_task


def load(
    checkpoint: str | Path,
    device: str | torch.device | None = None,
    optimize: bool = False,
    backend: Backend | None = None,
    precision: Precision = "32-true",
) -> Predictor:
    """Load a trained network to be used.

    Args:
        checkpoint: A checkpoint of `fit`, or an ONNX or OpenVINO file of `export`.
        device: Where to run; a GPU if there is one when left out. Files run on the CPU.
        optimize: Make torch's network faster, with equal results (`seglab.optimizing`), when the
            first image is there: what is fastest depends on its size.
        backend: What runs the network: `torch`, `onnxruntime` or `openvino`. These two compile a
            checkpoint once for each size of images. Files are run by their own if left out.
        precision: `32-true`, or `bf16-mixed` or `16-mixed` as in Lightning's Trainer, which is
            faster where the processor has such arithmetic and gives slightly other ids: torch's
            autocast, or `bf16-mixed` of OpenVINO.

    Returns:
        A model with `predict`, `overlay` and `class_names`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint of this program, its weights do not fit its config, the
            device is not there, or the backend is not installed or cannot do what is asked.
    """
    _refuse_other_ways(backend, device, optimize, is_file=is_exported(checkpoint))
    _refuse_unusable_device(device)
    if is_exported(checkpoint):
        return _load_exported(Path(checkpoint), backend, precision)
    refuse_precision(backend or "torch", precision)
    if optimize and precision != "32-true":
        raise ValueError(
            f"optimize gives the results of float32, and precision {precision!r} others: leave one "
            "of the two out"
        )
    content = read_checkpoint(checkpoint)
    config = content.get("config")
    if config is None or "state_dict" not in content:
        raise ValueError(
            f"{checkpoint} holds no config: seglab.load takes checkpoints written by `fit`; for "
            "bare weights build the network yourself and use load_state_dict"
        )
    task = build_task(config["model"], content["hyper_parameters"])
    refuse_mismatch(task.state_dict(), content["state_dict"], f"checkpoint {checkpoint}")
    task.load_state_dict(content["state_dict"])
    task.eval_precision = "same"  # as `precision` says; the training's own choice ends here
    options = config["data"].get("init_args", {})
    if backend not in (None, "torch"):
        task.network = CompiledNetwork(task.network, backend, precision)
        device, precision = "cpu", "32-true"  # what follows the network
    best = device or ("cuda" if torch.cuda.is_available() else "cpu")
    task = task.to(best).eval()
    scale = options.get("eval_scale")
    return Predictor(task, _image_format(options), scale, optimize, precision)


def _refuse_other_ways(
    backend: str | None, device: str | torch.device | None, optimize: bool, is_file: bool
) -> None:
    if backend in (None, "torch") and not is_file:
        return
    if not is_file:
        refuse_missing_runtime(str(backend))
    if optimize:
        raise ValueError(
            "optimize changes torch's network, and another backend runs this one: leave one of the"
            " two out"
        )
    if device is not None and str(device).partition(":")[0] != "cpu":
        raise ValueError(f"device {device}: exported files and other backends run on the CPU")


def _refuse_unusable_device(device: str | torch.device | None) -> None:
    if device is None:
        return
    try:
        torch.empty(1, device=device).cpu()  # `meta` holds no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"device {device} cannot be used here ({first}): give cpu, or leave it out"
        ) from error


def _load_exported(path: Path, backend: str | None, precision: str) -> Predictor:
    task, noted = load_exported(path, backend, precision)
    return Predictor(task, _image_format(noted["image"]), noted["evaluation"]["eval_scale"])


def _image_format(options: Mapping[str, Any]) -> ImageFormat:
    """Of a data module's arguments, or of what an exported file says of its images."""
    low_high = options.get("value_range")
    return ImageFormat(
        options.get("channels", 3),
        tuple(low_high) if low_high else None,
        options.get("drop_alpha", False),
    )
