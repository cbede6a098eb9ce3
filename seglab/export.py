"""Write a trained network as a file that runs elsewhere, and prove it before it is kept.

Normalization is inside: the file takes images as they are. Every file is written under another
name, read back, compared with the network on random and real images of several sizes, and only then
renamed. What an exporter froze without a word (a size, a batch) shows there.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seglab.operators.free_pooling import free_grids_
from seglab.quantization import QUANTIZES, quantize
from seglab.runtimes import Run, annotate, open_file

Format = Literal["onnx", "openvino", "torch_export", "safetensors"]

SUFFIXES: Mapping[str, str] = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "torch_export": ".pt2",
    "safetensors": ".safetensors",
}
TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order stay a hundred times below
METADATA = "seglab.json"
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "torch_export": (),
    "safetensors": ("safetensors",),
}
_TRIED = ((256, 320), (192, 352), (203, 333))  # traced at the first, whose sides differ


class ExportError(ValueError):
    """The network cannot be written as asked; says why and what can be done."""


class Exported(NamedTuple):
    """What was written, and how far it was proved."""

    path: Path
    n_images: int
    largest_difference: float
    is_quantized: bool = False

    def __str__(self) -> str:
        when = "before quantization " if self.is_quantized else ""  # that file was compared
        return (
            f"{self.path}: {when}equal to the network on {self.n_images} images, largest difference"
            f" {self.largest_difference:.1e} of the largest logit"
        )


def export_network(
    network: nn.Module,
    path: str | Path,
    kind: Format,
    *,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    is_deep: bool = False,
    images: Sequence[Tensor] = (),
    metadata: Mapping[str, Any] | None = None,
    calibration: Sequence[Tensor] = (),
    check: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Exported:
    """Write a network, images in 0..255 to logits, as a file.

    Args:
        network: (B, C, H, W) to (B, K, H, W); a copy in evaluation mode, float32, is written.
        path: The file to write; it appears when it is proved. Missing folders are made.
        kind: `onnx`, `openvino` (beside the `.xml` it writes a `.bin`) and `torch_export` hold the
            computation, `safetensors` the weights alone.
        size: Height and width to fix; None leaves them free. The batch is always free.
        channels: Bands C.
        is_deep: Whether images are float32 and not uint8.
        images: Real images (C, h, w) to compare on besides random ones.
        metadata: What the file shall say of itself, as JSON.
        calibration: Images (C, h, w) to quantize on, for `onnx` and `openvino`: weights and
            activations become 8-bit integers. The file of floats is what is proved.
        check: Called with the file before it is kept; returns what is added to the metadata, or
            raises ExportError.

    Raises:
        ExportError: A package is missing, the network cannot be exported so, or the file computes
            something else. Nothing is left behind.
    """
    path = Path(path)
    refuse_missing_packages(kind, quantized=bool(calibration))
    if kind == "openvino" and path.suffix != ".xml":
        raise ExportError(f"{path}: OpenVINO reads a network from a pair of files, name it .xml")
    network = deepcopy(network).eval().cpu().float()
    noted = dict(metadata or {})
    trials = list(_trials(size, channels, is_deep, images))
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder, f"network{SUFFIXES[kind]}")
        with torch.no_grad(), _quiet():
            run = _write(network, written, kind, noted, trials, size)
            result = _prove(network, run, trials, path)
            if calibration:
                quantize(written, calibration, size, is_deep)
                result = Exported(*result[:3], is_quantized=True)
            found = check(written) if check else {}
            if found or calibration:
                annotate(written, {**noted, **found})
        _keep(written, path)
    return result


def _write(
    network: nn.Module,
    written: Path,
    kind: Format,
    noted: Mapping[str, Any],
    trials: Sequence[Tensor],
    size: tuple[int, int] | None,
) -> Run:
    """Write the file; returns what runs it as it was read back."""
    if kind == "safetensors":
        return _write_weights(network, written, json.dumps(noted))
    traced = network if size else free_grids_(deepcopy(network))
    program = trace(traced, trials[0], size)
    if kind == "torch_export":
        return _write_program(program, written, json.dumps(noted))
    write = write_onnx if kind == "onnx" else _write_openvino
    write(program, written)
    annotate(written, noted)
    return open_file(written, "onnxruntime" if kind == "onnx" else "openvino")


def _keep(written: Path, path: Path) -> None:
    """Move a file to its name; weights beside it first."""
    if written.suffix == ".xml":
        os.replace(written.with_suffix(".bin"), path.with_suffix(".bin"))
    os.replace(written, path)


def refuse_missing_packages(kind: str, quantized: bool = False) -> None:
    """Raise ExportError if the format is none, or what writes and checks it is not installed."""
    if kind not in get_args(Format):
        raise ExportError(f"format {kind!r}: give one of {', '.join(get_args(Format))}")
    if quantized and kind not in QUANTIZES:
        raise ExportError(f"format {kind} is not quantized: give one of {', '.join(QUANTIZES)}")
    needed = (*_NEEDED[kind], *(QUANTIZES[kind] if quantized else ()))
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"format {kind} needs {', '.join(missing)}: pip install {' '.join(missing)}"
            " (the extra seglab[export] has all)"
        )


def _trials(
    size: tuple[int, int] | None, channels: int, is_deep: bool, images: Sequence[Tensor]
) -> Iterator[Tensor]:
    """Random batches of several sizes (the first is traced), then the real images one by one."""
    generator = torch.Generator().manual_seed(0)
    tried = [size, size, size] if size else list(_TRIED)
    for n_images, (height, width) in zip((2, 1, 3), tried, strict=True):
        shape = (n_images, channels, height, width)
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        yield noise.float() if is_deep else noise
    for image in images:
        fitted = image[None].float()
        if size:
            fitted = nn.functional.interpolate(fitted, size=size, mode="bilinear")
        yield fitted if is_deep else fitted.round().to(torch.uint8)


def trace(
    network: nn.Module, example: Tensor, size: tuple[int, int] | None
) -> torch.export.ExportedProgram:
    """Record a network's operations; the batch is free, the size where it is None."""
    auto = torch.export.Dim.AUTO
    free = {0: auto} if size else {0: auto, 2: auto, 3: auto}
    try:
        return torch.export.export(network, (example,), dynamic_shapes=(free,))
    except Exception as error:  # the exporter raises whatever the network leads it to
        raise ExportError(f"torch.export refuses the network: {_first_line(error)}") from error


def _write_program(program: torch.export.ExportedProgram, path: Path, noted: str) -> Run:
    torch.export.save(program, path, extra_files={METADATA: noted})
    read = torch.export.load(path, extra_files={METADATA: ""})
    module = read.module()
    return lambda image: np.asarray(module(image))


def write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a traced network as ONNX, from `image` to `logits`."""
    try:
        torch.onnx.export(
            program,
            f=path,
            input_names=["image"],
            output_names=["logits"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # the exporter raises whatever the network leads it to
        raise ExportError(f"torch.onnx refuses the network: {_first_line(error)}") from error


def _write_openvino(program: torch.export.ExportedProgram, path: Path) -> None:
    import openvino

    try:
        model = openvino.convert_model(program)
    except Exception as error:  # as above
        raise ExportError(f"OpenVINO refuses the network: {_first_line(error)}") from error
    model.inputs[0].get_tensor().set_names({"image"})
    model.outputs[0].get_tensor().set_names({"logits"})
    openvino.save_model(model, path, compress_to_fp16=False)


def _write_weights(network: nn.Module, path: Path, noted: str) -> Run:
    """Write the state dict; what is proved is the network with the weights that were read back."""
    from safetensors.torch import load_file, save_file

    state = {name: tensor.contiguous().clone() for name, tensor in network.state_dict().items()}
    save_file(state, path, metadata={"seglab": noted, **_flat(noted)})
    copy = deepcopy(network)
    for parameter in copy.parameters():
        parameter.zero_()
    copy.load_state_dict(load_file(path))
    return lambda image: np.asarray(copy(image))


def _flat(noted: str) -> dict[str, str]:
    """The metadata once more, one text per key, for readers that know no JSON within JSON."""
    return {key: json.dumps(value) for key, value in json.loads(noted).items()}


def _prove(network: nn.Module, run: Run, trials: Sequence[Tensor], path: Path) -> Exported:
    worst, n_images = 0.0, 0
    for image in trials:
        try:
            expected = network(image).numpy()
        except (RuntimeError, ValueError):
            if image is trials[0]:
                raise
            continue  # a size that the network itself does not take
        worst = max(worst, _difference(run, image, expected, path))
        n_images += len(image)
    return Exported(path, n_images, worst)


def _difference(run: Run, image: Tensor, expected: NDArray[Any], path: Path) -> float:
    """Largest difference of the logits, relative to the largest of them."""
    shape = tuple(image.shape)
    cure = "fix the image's size with --size HEIGHT,WIDTH"
    try:
        found = run(image)
    except Exception as error:  # each runtime has its own
        raise ExportError(
            f"{path} is not written: the exported network does not run on {shape}"
            f" ({_first_line(error)}); {cure}"
        ) from error
    scale = max(float(np.abs(expected).max()), 1e-12)
    same = found.shape == expected.shape
    difference = float(np.abs(found - expected).max()) / scale if same else float("inf")
    if not difference <= TOLERANCE:  # NaN is not
        raise ExportError(
            f"{path} is not written: on {shape} the exported network differs by {difference:.1e}"
            f" of the largest logit, allowed is {TOLERANCE:.0e}; {cure}"
        )
    return difference


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own deprecations and progress."""
    import logging

    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
