"""Whole-network inference, image to class ids: ours, other libraries' and other runtimes.

    python benchmarks/inference.py [--size 512,512] [--threads 1] [--repeats 3]
    python benchmarks/inference.py --networks UPerNet-Swin-T --without onnxruntime openvino
    python benchmarks/inference.py --size 1024,2048 --networks PSPNet-R101-D8

Each way begins with the same uint8 image and ends with ids (H, W) of 150 classes:

- ours: `SegmentationTask.predict_step`, which `seglab.load(...).predict` calls,
- optimized: the same after `seglab.load(..., optimize=True)`,
- bf16: ours with `precision="bf16-mixed"`, torch's autocast,
- onnxruntime, openvino: the same with that backend, in float32,
- openvino-bf16: the same with `precision="bf16-mixed"`,
- openvino-int8: a file of `export --format openvino --int8`, calibrated on noise here,
- MMSegmentation: `test_step`, which its `inference_model` calls once an image is read, with ours'
  weights (`mmseg_reference.py` says how to get it; left out if it is not there),
- transformers: its network and `post_process_semantic_segmentation`'s resizing and argmax,
- smp: normalization, the network and argmax, as its documentation runs it.

All in one process, in turn. Ratios are of the processor's time turn by turn, median (least to
greatest): unlike the clock's, it hardly depends on what else the machine does. With one thread the
two are the same on a quiet machine.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mmseg_reference as reference
import torch
from acceleration import segformer, upernet
from torch import Tensor, nn

from seglab.export import export_network
from seglab.exported import CompiledNetwork, ExportedNetwork
from seglab.models import Segmenter, SmpNetwork, TimmEncoder
from seglab.models.heads import Head, PSPHead, UPerHead
from seglab.models.segmenter import Network
from seglab.optimizing import optimize
from seglab.runtimes import open_file
from seglab.task import SegmentationTask

N_CLASSES = 150
Way = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A network of ours and what stands beside it."""

    build: Callable[[], Network]
    others: dict[str, Callable[[Network], Way]]


def timm_network(backbone: str, head: type[Head]) -> Network:
    """The recipe's network, all parameters away from 0 and 1."""
    stride = 8 if backbone == "resnet-101" else 32
    encoder = TimmEncoder(reference.BACKBONES[backbone][1], output_stride=stride)
    network = Segmenter(encoder, head(encoder.channels, N_CLASSES, dropout=0.0))
    reference.scramble(network)
    return network


def mmsegmentation(backbone: str, head: type[Head], ours: Network) -> Way:
    """MMSegmentation's network; it has the parameters' names and so ours' weights."""
    assert isinstance(ours, Segmenter)
    channels = ours.encoder.channels
    config = reference.network_config(
        backbone,
        reference.head_config(head.__name__, channels, N_CLASSES),
        reference.auxiliary_config(channels, N_CLASSES, channels=256),
        crop=512,
    )
    config["data_preprocessor"].pop("size")
    config["data_preprocessor"]["test_cfg"] = {"size_divisor": 1}
    network = reference.builder()(config).eval()
    reference.scramble(network)
    # theirs into ours, whose names can be translated
    ours.load_state_dict(ours.translate_state(network.state_dict()), strict=False)

    def way(image: Tensor) -> Tensor:
        found = network.test_step(reference.samples(image, image[:, 0]))
        return found[0].pred_sem_seg.data

    return way


def normalized(image: Tensor) -> Tensor:
    """As preprocessors of other libraries do."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (reference.MEAN, reference.STD))
    return (image.float() - mean) / std


def transformers(build: Callable[[], nn.Module], _: Network) -> Way:
    """A network of transformers, with its own random weights."""
    network = build().eval()

    def way(image: Tensor) -> Tensor:
        logits = network(pixel_values=normalized(image)).logits
        size = tuple(image.shape[-2:])
        return nn.functional.interpolate(logits, size=size, mode="bilinear").argmax(1)

    return way


def smp(ours: Network) -> Way:
    """The network within ours, as it comes."""
    network = copy.deepcopy(ours.get_submodule("model")).eval()
    return lambda image: network(normalized(image)).argmax(1)


CASES = {
    "UPerNet-Swin-T": Case(
        partial(timm_network, "swin-t", UPerHead),
        {
            "MMSegmentation": partial(mmsegmentation, "swin-t", UPerHead),
            "transformers": partial(transformers, partial(upernet, "swin-t", N_CLASSES)),
        },
    ),
    "PSPNet-R101-D8": Case(
        partial(timm_network, "resnet-101", PSPHead),
        {"MMSegmentation": partial(mmsegmentation, "resnet-101", PSPHead)},
    ),
    "SegFormer-B0": Case(
        lambda: SmpNetwork("Segformer", "mit_b0", N_CLASSES),
        {"transformers": partial(transformers, partial(segformer, N_CLASSES)), "smp": smp},
    ),
    "smp Unet-R34": Case(lambda: SmpNetwork("Unet", "resnet34", N_CLASSES), {"smp": smp}),
}


def ids_of(network: Network) -> Way:
    """What the predictor does with an image."""
    task = SegmentationTask(network, N_CLASSES).eval()
    return lambda image: task.predict_step({"image": image, "mask": image[:, 0]}, 0)


def ways_of(case: Case, image: Tensor, without: list[str]) -> dict[str, Way]:
    """Everybody's way, ours last but for what follows from it."""
    ours = case.build().eval()
    ways: dict[str, Way] = {}
    for name, build in case.others.items():
        is_there = name != "MMSegmentation" or reference.is_there()
        if name not in without and is_there:
            ways[name] = build(ours)
    ways["ours"] = ids_of(ours)
    if "optimized" not in without:
        faster, done = optimize(ours, image, repeats=1)
        print(f"optimized: {done}", flush=True)
        ways["optimized"] = ids_of(faster)  # type: ignore[arg-type]
    if "bf16" not in without:
        ways["bf16"] = in_bfloat16(ways["ours"])
    for name in ("onnxruntime", "openvino", "openvino-bf16"):
        if name not in without:
            backend, _, half = name.partition("-")
            precision = "bf16-mixed" if half else "32-true"
            ways[name] = ids_of(CompiledNetwork(ours, backend, precision))
    if "openvino-int8" not in without:
        ways["openvino-int8"] = ids_of(quantized(ours, image))
    return ways


def in_bfloat16(way: Way) -> Way:
    """What `seglab.load(..., precision="bf16-mixed")` does."""

    def half(image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return way(image)

    return half


def quantized(network: Network, image: Tensor) -> Network:
    """The network of an 8-bit file for images of this size; speed alone, its ids mean nothing."""
    noted = {
        "class_names": [str(k) for k in range(N_CLASSES)],
        "image": {"channels": 3, "size": image.shape[-2:], "value_range": None},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.xml")
        size = (image.shape[-2], image.shape[-1])
        export_network(network, path, "openvino", size=size, calibration=[image[0]])
        return ExportedNetwork(open_file(path, "openvino"), noted, path)


@torch.inference_mode()
def measure(ways: dict[str, Way], image: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of the processor, in alternating order; one pass before is not timed."""
    found = {name: way(image).squeeze() for name, way in ways.items()}
    for name, ids in found.items():
        print(f"{name}: {(ids == found['ours']).float().mean():.4%} of the ids are ours'")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name in list(ways) if turn % 2 else list(ways)[::-1]:
            start = time.process_time()
            ways[name](image)
            times[name].append(time.process_time() - start)
    return times


def lines(name: str, times: dict[str, list[float]]) -> list[str]:
    """Rows of the table; ratios against the first."""
    base = next(iter(times))
    result = []
    for way, seconds in times.items():
        cells = [name, way, f"{statistics.median(seconds) * 1e3:.0f}"]
        if way != base:
            ratios = sorted(a / b for a, b in zip(times[base], seconds, strict=True))
            middle = statistics.median(ratios)
            cells.append(f"**{middle:.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        else:
            cells.append("1")
        result.append(f"| {' | '.join(cells)} |")
        name = ""
    return result


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="512,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--without", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    height, width = map(int, options.size.split(","))
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    print(f"torch {torch.__version__}, {vars(options)}")
    for name in options.networks:
        ways = ways_of(CASES[name], image, options.without)
        print("| network | whose | CPU ms | times as fast as the first |\n|---|---|--:|--:|")
        print("\n".join(lines(name, measure(ways, image, options.repeats))), flush=True)


if __name__ == "__main__":
    main()
