"""Networks that run outside of torch: exported files, and checkpoints compiled when used.

Pre- and post-processing stay those of the checkpoint, so that class ids agree.
"""

from __future__ import annotations

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seglab.export import trace, write_onnx
from seglab.inference import Inference
from seglab.models.segmenter import Network
from seglab.runtimes import (
    Run,
    backend_of,
    compile_openvino,
    open_file,
    read_metadata,
    refuse_missing_runtime,
    refuse_precision,
)
from seglab.task import SegmentationTask

N_KEPT = 4
"""Compiled programs that are kept, one per image size."""


class ExportedNetwork(Network):
    """The network of an exported file.

    Args:
        run: Maps images to logits at their size.
        metadata: What the file says of itself.
        path: The file, for messages.
    """

    def __init__(self, run: Run, metadata: Mapping[str, Any], path: Path) -> None:
        super().__init__()
        self.run = run
        self.path = path
        self.num_classes = len(metadata["class_names"])
        image = metadata["image"]
        self.in_channels = image["channels"]
        self.size = tuple(image["size"]) if image["size"] else None
        self.dtype = torch.uint8 if image["value_range"] is None else torch.float32

    def decode(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return (logits,); the file upsamples by itself."""
        return (self(image),)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (B, C, H, W) in 0..255 to logits (B, K, H, W).

        Raises:
            ValueError: The file takes another size, or another type of numbers.
        """
        size = (image.shape[-2], image.shape[-1])
        if self.size not in (None, size):
            raise ValueError(
                f"{self.path} takes images of {self.size} pixels and got {size}: export without"
                " --size, or use the checkpoint with this backend"
            )
        if image.dtype != self.dtype:
            raise ValueError(
                f"{self.path} takes {self.dtype} and got {image.dtype}, as evaluation at several"
                " scales gives: use the checkpoint with this backend"
            )
        return torch.from_numpy(self.run(image.cpu().contiguous()))


class CompiledNetwork(Network):
    """A network that another runtime compiles, once for each image size that it meets.

    Args:
        network: In evaluation mode.
        backend: `onnxruntime` or `openvino`.
        precision: That `backend` can compute in.
    """

    def __init__(self, network: Network, backend: str, precision: str = "32-true") -> None:
        super().__init__()
        refuse_missing_runtime(backend)
        self.num_classes = network.num_classes
        self.in_channels = network.in_channels
        self.upsampling = network.upsampling
        self.plain = _FirstLogits(copy.deepcopy(network)).eval().cpu().float()
        self.backend, self.precision = backend, precision
        self.programs: OrderedDict[Any, Run] = OrderedDict()

    def decode(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return (logits,) at head resolution."""
        key = (tuple(image.shape[-2:]), image.dtype)
        if key not in self.programs:
            self.programs[key] = _compile(self.plain, image, self.backend, self.precision)
        self.programs.move_to_end(key)
        while len(self.programs) > N_KEPT:
            self.programs.popitem(last=False)
        return (torch.from_numpy(self.programs[key](image.cpu().contiguous())),)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (B, C, H, W) in 0..255 to logits (B, K, H, W)."""
        (logits,) = self.decode(image)
        if self.upsampling is None:
            return logits
        return self.upsampling(logits, (image.shape[-2], image.shape[-1]))


class _FirstLogits(nn.Module):
    """The main logits, where possible before they are resized to the image."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        if self.network.upsampling is None:
            whole: Tensor = self.network(image)
            return whole
        return self.network.decode(image)[0]


def _compile(network: nn.Module, image: Tensor, backend: str, precision: str) -> Run:
    with torch.inference_mode(False), torch.no_grad():
        example = torch.zeros(2, *image.shape[1:], dtype=image.dtype)  # of 1 it would be a constant
        program = trace(network, example, (image.shape[-2], image.shape[-1]))
        if backend == "openvino":
            import openvino

            return compile_openvino(openvino.convert_model(program), precision)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "network.onnx")
            write_onnx(program, path)
            return open_file(path, backend)


def load_exported(
    path: Path, backend: str | None, precision: str = "32-true"
) -> tuple[SegmentationTask, dict[str, Any]]:
    """Build the task around an exported file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not one of `export`, or its runtime is not installed or does not compute
            in this precision.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: check the path.")
    chosen = backend_of(path, backend)
    refuse_precision(chosen, precision)
    noted = read_metadata(path)
    rule = dict(noted["evaluation"])
    rule.pop("eval_scale")
    for name in ("crop_size", "stride", "scales"):
        rule[name] = tuple(rule[name]) if rule[name] is not None else None
    network = ExportedNetwork(open_file(path, chosen, precision), noted, path)
    task = SegmentationTask(
        network,
        network.num_classes,
        inference=Inference(**rule),
        class_names=noted["class_names"],
        palette=[(r, g, b) for r, g, b in noted["palette"]],
        ignore_index=noted["ignore_index"],
    )
    return task.eval(), noted
