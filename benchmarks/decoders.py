"""ESeg-style and RSP-style networks beside PSPNet, DeepLabV3, UPerNet and SegFormer: one table.

    nice python benchmarks/decoders.py [--size 512 1024] [--threads 1] [--repeats 2] [--device cpu]
    python benchmarks/decoders.py --count
    python benchmarks/decoders.py --only eseg SegFormer

Parameters and multiply-adds (GMACs) are counted on the meta device for one image of 1024 x 2048
with 19 classes; images per second and memory are measured at `--size`, batch 1. Multiply-adds are
those of convolutions, matrix products and attention, of fusions in their plain form, as
`seglab.summary` has them, and of RSP's attention, which PyTorch's counter does not see. On one
thread of a CPU, seconds are those that the process computes, so that other work on the machine does
not count as waiting. Memory: the most that a forward pass holds beside the weights. Encoders have
random weights. `--count` leaves out what must be measured.

Atrous convolutions are those of more than 1x1 with a dilation above 1; the finest stride is that of
the finest map that a convolution behind the encoder makes. The last column says which claims of the
two papers hold for our networks. ESeg-style: more images per second than PSPNet, DeepLabV3 and
SegFormer-B0, each of which is a row, no atrous convolution, no stride below 4; RSP-style: at most a
quarter of DeepLabV3's multiply-adds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from side_by_side import peak_bytes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import ASPPHead, BiFPNHead, PSPHead, RSPHead, UPerHead
from seglab.models.heads.base import Head
from seglab.models.heads.rsp import RelationalSemanticsExtractor
from seglab.models.necks import BiFPN
from seglab.operators.fusion_conv import FusionBlock

N_CLASSES = 19
COUNTED = (1024, 2048)
CONFIGS = Path(__file__).parents[1] / "configs"
Build = Callable[[], nn.Module]


def ours(backbone: str, head: Any, output_stride: int = 32) -> nn.Module:
    """A network of this framework, without weights."""
    return Segmenter(TimmEncoder(backbone, output_stride=output_stride), head, None, N_CLASSES)


def eseg(name: str) -> nn.Module:
    """An ESeg-style network as its config for Cityscapes has it."""
    import yaml

    config = yaml.safe_load((CONFIGS / "cityscapes" / f"{name}.yaml").read_text())
    parts = config["model"]["network"]["init_args"]
    options = parts["head"]["init_args"]
    if "activation" in options:
        options["activation"] = nn.ReLU6
    return ours(parts["encoder"]["init_args"]["name"], partial(BiFPNHead, **options))


class MLPHead(Head):
    """SegFormer's head: each level to 256 channels, concatenated at the finest, mixed by 1x1."""

    def __init__(self, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__(in_channels, num_classes, channels=256, dropout=0.1)
        self.linear = nn.ModuleList(nn.Conv2d(width, 256, 1) for width in in_channels)
        self.fuse = FusionBlock([256] * len(in_channels), 256, kernel_size=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features, fine to coarse, to logits at the finest level's size."""
        levels = [linear(x) for linear, x in zip(self.linear, features, strict=True)]
        return self.classify(self.fuse(levels))


def of_smp(kind: str, encoder: str) -> nn.Module:
    """A network of segmentation_models_pytorch, with its defaults."""
    import segmentation_models_pytorch as smp

    network: nn.Module = smp.create_model(kind, encoder, encoder_weights=None, classes=N_CLASSES)
    return network


class HuggingFaceSegFormer(nn.Module):
    """SegFormer-B0 of transformers, logits at stride 4 brought to the image's size."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        config = transformers.SegformerConfig(num_labels=N_CLASSES)
        self.network = transformers.SegformerForSemanticSegmentation(config)

    def forward(self, image: Tensor) -> Tensor:
        """Map a normalized image to logits."""
        logits = self.network(pixel_values=image).logits
        return nn.functional.interpolate(logits, image.shape[-2:], mode="bilinear")


R101, R18 = "resnet101c.gluon_in1k", "resnet18"
NETWORKS: dict[str, Build] = {
    "PSPNet, R101-D8": partial(ours, R101, PSPHead, 8),
    "DeepLabV3, R101-D8": partial(ours, R101, ASPPHead, 8),
    "UPerNet, R101": partial(ours, R101, UPerHead),
    "PSPNet, R18-D8, 128 channels": partial(ours, R18, partial(PSPHead, channels=128), 8),
    "DeepLabV3, R18-D8, 128 channels": partial(ours, R18, partial(ASPPHead, channels=128), 8),
    "SegFormer-B0-like, PVTv2-B0": partial(ours, "pvt_v2_b0", MLPHead),
    "DeepLabV3, R101, smp": partial(of_smp, "DeepLabV3", "resnet101"),
    "PSPNet, R101, smp": partial(of_smp, "PSPNet", "resnet101"),
    "SegFormer-B0, smp": partial(of_smp, "Segformer", "mit_b0"),
    "SegFormer-B0, transformers": HuggingFaceSegFormer,
    **{name: partial(eseg, name) for name in (
        "eseg_lite_s", "eseg_lite_m", "eseg_lite_l", "eseg_s", "eseg_m", "eseg_l",
    )},
    "RSP-style, R101, FPN-128": partial(ours, R101, RSPHead),
    "RSP-style, R101, FPN-256": partial(
        ours, R101, partial(RSPHead, channels=256, key_channels=128)
    ),
    "RSP-style, R101, BiFPN-128": partial(
        ours, R101, partial(RSPHead, pyramid=partial(BiFPN, levels=(2, 5)))
    ),
}  # fmt: skip
RIVALS = [name for name in NETWORKS if not name.startswith(("eseg", "RSP", "UPer"))]
DEEPLAB = "DeepLabV3, R101-D8"


class Costs(NamedTuple):
    """What a network costs; the last two are None where nothing is measured."""

    parameters: float  # millions
    gmacs: float
    atrous: int
    finest_stride: int
    images_per_second: float | None = None
    megabytes: float | None = None


def count(network: nn.Module) -> Costs:
    """Count at `COUNTED`; the network ends up on the meta device."""
    counted = {"attention": 0, "height": 0}

    def add_attention(module: RelationalSemanticsExtractor, args: Any, _: object) -> None:
        n_pixels = args[0].shape[-2] * args[0].shape[-1]
        width = module.query.out_channels + module.value.out_channels
        counted["attention"] += n_pixels * module.window**2 * width

    def look_at_size(_: nn.Module, __: object, output: Tensor) -> None:
        counted["height"] = max(counted["height"], output.shape[-2])

    atrous = 0
    for name, module in network.to("meta").eval().named_modules():
        if isinstance(module, RelationalSemanticsExtractor):
            module.register_forward_hook(add_attention)  # type: ignore[arg-type]
        if isinstance(module, nn.Conv2d):
            atrous += max(module.dilation) > 1 and max(module.kernel_size) > 1
            if "encoder" not in name:
                module.register_forward_hook(look_at_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, *COUNTED, device="meta"))
    macs = counted["attention"] + counter.get_total_flops() // 2
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Costs(parameters / 1e6, macs / 1e9, atrous, COUNTED[0] // counted["height"])


def measure(network: nn.Module, options: argparse.Namespace) -> tuple[float, float]:
    """Images per second (median) and megabytes of a forward pass."""
    network = network.eval().to(options.device)
    image = torch.rand(1, 3, *options.size, device=options.device)
    alone = options.device == "cpu" and options.threads == 1
    clock = time.process_time if alone else time.perf_counter

    def forward() -> None:
        with torch.inference_mode():
            network(image)

    peak = peak_bytes(forward, device=options.device)  # the first pass, which is not timed
    seconds = []
    for _ in range(options.repeats):
        start = clock()
        forward()
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return 1 / statistics.median(seconds), peak / 1e6


def costs(name: str, options: argparse.Namespace) -> Costs:
    """All costs of one network."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    measured = (None, None) if options.count else measure(network, options)
    return Costs(*count(network)[:4], *measured)


def verdict(name: str, found: dict[str, Costs]) -> str:
    """Which claims of the network's paper hold here."""
    own = found[name]
    if name.startswith("RSP"):
        if DEEPLAB not in found:
            return ""
        share = own.gmacs / found[DEEPLAB].gmacs
        return f"{share:.1%} of DeepLabV3's GMACs: {_holds(share <= 0.25)}"
    if not name.startswith("eseg"):
        return ""
    claims = [f"no atrous convolution, stride >= 4: {_holds(own == _modest(own))}"]
    if own.images_per_second is not None:
        rivals = [rival for rival in RIVALS if rival in found]
        faster = [r for r in rivals if found[r].images_per_second >= own.images_per_second]
        beaten = "all" if not faster else f"all but {', '.join(faster)}"
        claims.append(f"faster than {beaten}: {_holds(not faster)}")
    return "; ".join(claims)


def _modest(own: Costs) -> Costs:
    return own._replace(atrous=0, finest_stride=max(4, own.finest_stride))


def _holds(true: bool) -> str:
    return "holds" if true else "**misses**"


def print_costs(options: argparse.Namespace) -> None:
    """Print the table."""
    height, width = options.size
    measured = [] if options.count else [f"images/s, {height} x {width}", "MB"]
    counted = ["parameters, M", "GMACs", "atrous convolutions", "finest stride behind the encoder"]
    heads = ["network", *counted, *measured, "claim"]
    print(f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 2)}---|", flush=True)
    names = [name for name in NETWORKS if any(part in name for part in options.only)]
    found: dict[str, Costs] = {}
    for name in names:
        found[name] = costs(name, options)
        pairs = zip(found[name], (2, 1, 0, 0, 2, 0), strict=True)
        cells = [f"{value:.{n}f}" for value, n in pairs if value is not None]
        print(f"| {' | '.join([name, *cells, verdict(name, found)])} |", flush=True)


def main() -> None:
    """Print the table asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, nargs=2, default=(512, 1024))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", action="store_true", help="measure nothing")
    parser.add_argument(
        "--only", nargs="+", default=[""], help="networks with these in their names"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_costs(options)


if __name__ == "__main__":
    main()
