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

Format = Literal["onnx", "torch_export", "safetensors"]
Run = Callable[[Tensor], NDArray[Any]]

SUFFIXES: Mapping[str, str] = {
    "onnx": ".onnx",
    "torch_export": ".pt2",
    "safetensors": ".safetensors",
}
TOLERANCE = 1e-3  # of the largest logit: float32 sums in another order stay a hundred times below
METADATA = "seglab.json"
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch_export": (),
    "safetensors": ("safetensors",),
}
_TRACED = (256, 320)  # where the size is free: any two numbers that differ
_TRIED = ((256, 320), (192, 352), (203, 333))


class ExportError(ValueError):
    """The network cannot be written as asked; says why and what can be done."""


class Exported(NamedTuple):
    """What was written, and how far it was proved."""

    path: Path
    n_images: int
    largest_difference: float

    def __str__(self) -> str:
        return (
            f"{self.path}: equal to the network on {self.n_images} images, largest difference"
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
) -> Exported:
    """Write a network, images in 0..255 to logits, as a file.

    Args:
        network: (B, C, H, W) to (B, K, H, W); a copy in evaluation mode, float32, is written.
        path: The file to write; it appears when it is proved. Missing folders are made.
        kind: `onnx` and `torch_export` hold the computation, `safetensors` the weights alone.
        size: Height and width to fix; None leaves them free. The batch is always free.
        channels: Bands C.
        is_deep: Whether images are float32 and not uint8.
        images: Real images (C, h, w) to compare on besides random ones.
        metadata: What the file shall say of itself, as JSON.

    Raises:
        ExportError: A package is missing, the network cannot be exported so, or the file computes
            something else. Nothing is left behind.
    """
    path = Path(path)
    refuse_missing_packages(kind)
    network = deepcopy(network).eval().cpu().float()
    noted = json.dumps(dict(metadata or {}))
    trials = list(_trials(size, channels, is_deep, images))
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder, f"network{SUFFIXES[kind]}")
        with torch.no_grad(), _quiet():
            if kind == "safetensors":
                run = _write_weights(network, written, noted)
            else:
                program = _trace(network, trials, size)
                write = _write_onnx if kind == "onnx" else _write_program
                run = write(program, written, noted)
            result = _prove(network, run, trials, path)
        os.replace(written, path)
    return result


def refuse_missing_packages(kind: str) -> None:
    """Raise ExportError if the format is none, or what writes and checks it is not installed."""
    if kind not in get_args(Format):
        raise ExportError(f"format {kind!r}: give one of {', '.join(get_args(Format))}")
    missing = [name for name in _NEEDED[kind] if find_spec(name) is None]
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


def _trace(
    network: nn.Module, trials: Sequence[Tensor], size: tuple[int, int] | None
) -> torch.export.ExportedProgram:
    auto = torch.export.Dim.AUTO
    free = {0: auto} if size else {0: auto, 2: auto, 3: auto}
    try:
        return torch.export.export(network, (trials[0],), dynamic_shapes=(free,))
    except Exception as error:  # the exporter raises whatever the network leads it to
        raise ExportError(f"torch.export refuses the network: {_first_line(error)}") from error


def _write_program(program: torch.export.ExportedProgram, path: Path, noted: str) -> Run:
    torch.export.save(program, path, extra_files={METADATA: noted})
    read = torch.export.load(path, extra_files={METADATA: ""})
    module = read.module()
    return lambda image: np.asarray(module(image))


def _write_onnx(program: torch.export.ExportedProgram, path: Path, noted: str) -> Run:
    import onnx
    import onnxruntime

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
    except Exception as error:  # as above
        raise ExportError(f"torch.onnx refuses the network: {_first_line(error)}") from error
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"seglab": noted, **_flat(noted)})
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: np.asarray(session.run(None, {"image": image.numpy()})[0])


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
