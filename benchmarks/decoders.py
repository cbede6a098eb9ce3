"""ESeg-style and RSP-style networks beside PSPNet, DeepLabV3, UPerNet and SegFormer-B0: one table.

    python benchmarks/decoders.py [--size 256 512] [--threads 2] [--repeats 3] [--device cpu]
    python benchmarks/decoders.py --count
    python benchmarks/decoders.py --camvid /path/to/camvid --steps 1350 --seeds 0 1 2
    python benchmarks/decoders.py --receptive-field

Parameters and multiply-adds (GMACs) are counted on the meta device for one image of 1024 x 2048
with 19 classes; images per second and memory are measured at `--size`. Multiply-adds are those of
convolutions and matrix products, as `seglab.summary` has them, and of RSP's attention, which
PyTorch's counter does not see. Memory: the most that a forward pass holds beside the weights.
Encoders have random weights; nothing else may run. The last column says which claims of the two
papers hold for our networks. ESeg-style: more images per second than PSPNet, DeepLabV3 and
SegFormer-B0, each of which is a row; RSP-style: at most a quarter of DeepLabV3's multiply-adds.
`--count` leaves out what must be measured. Atrous convolutions are those with a dilation above 1.

`--camvid` trains the networks of `configs/camvid` for equal steps, with equalization and without,
and prints mIoU: mean and standard deviation over the seeds. `--receptive-field` prints from how
many rows of P5 the middle pixel of the finest level of one BiFPN cell takes, by its gradient.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import peak_bytes, time_in_turn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import ASPPHead, BiFPNHead, PSPHead, RSPHead, UPerHead
from seglab.models.heads.rsp import RelationalSemanticsExtractor
from seglab.models.necks import BiFPN

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


def smp_segformer() -> nn.Module:
    """SegFormer-B0 of segmentation_models_pytorch."""
    import segmentation_models_pytorch as smp

    network: nn.Module = smp.Segformer("mit_b0", encoder_weights=None, classes=N_CLASSES)
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
WITH_64 = {"channels": 64}
NETWORKS: dict[str, Build] = {
    "PSPNet, R101-D8": partial(ours, R101, PSPHead, 8),
    "DeepLabV3, R101-D8": partial(ours, R101, ASPPHead, 8),
    "UPerNet, R101": partial(ours, R101, UPerHead),
    "PSPNet, R18-D8, 128 channels": partial(ours, R18, partial(PSPHead, channels=128), 8),
    "DeepLabV3, R18-D8, 128 channels": partial(ours, R18, partial(ASPPHead, channels=128), 8),
    "SegFormer-B0, transformers": HuggingFaceSegFormer,
    "SegFormer-B0, smp": smp_segformer,
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


def count_macs(network: nn.Module) -> int:
    """Multiply-adds of a forward pass at `COUNTED`; the network ends up on the meta device."""
    total = 0

    def add_attention(
        module: RelationalSemanticsExtractor, args: tuple[Tensor, ...], _: object
    ) -> None:
        nonlocal total
        n_pixels = args[0].shape[-2] * args[0].shape[-1]
        total += (
            n_pixels * module.window**2 * (module.query.out_channels + module.value.out_channels)
        )

    for module in network.to("meta").eval().modules():
        if isinstance(module, RelationalSemanticsExtractor):
            module.register_forward_hook(add_attention)  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, *COUNTED, device="meta"))
    return total + counter.get_total_flops() // 2


def count_dilated(network: nn.Module) -> int:
    """Number of atrous convolutions."""
    return sum(isinstance(m, nn.Conv2d) and max(m.dilation) > 1 for m in network.modules())


def costs(name: str) -> tuple[float, float, int]:
    """Parameters in millions, GMACs, atrous convolutions."""
    with torch.device("meta"):
        network = NETWORKS[name]()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters / 1e6, count_macs(network) / 1e9, count_dilated(network)


def speed(name: str, options: argparse.Namespace) -> tuple[float, float]:
    """Images per second (median) and megabytes of a forward pass."""
    network = NETWORKS[name]().eval().to(options.device)
    image = torch.rand(1, 3, *options.size, device=options.device)

    def forward() -> Tensor:
        with torch.inference_mode():
            result: Tensor = network(image)
        return result

    seconds = statistics.median(time_in_turn({name: forward}, options.repeats)[name])
    return 1 / seconds, peak_bytes(forward, device=options.device) / 1e6


def verdict(name: str, found: dict[str, tuple[float, ...]]) -> str:
    """Whether the claim of the network's paper holds here."""
    if name.startswith("RSP"):
        share = found[name][1] / found[DEEPLAB][1]
        return f"{share:.0%} of DeepLabV3's GMACs: {'holds' if share <= 0.25 else '**misses**'}"
    if not name.startswith("eseg") or len(found[name]) < 4:
        return ""
    faster = [rival for rival in RIVALS if found[rival][3] >= found[name][3]]
    return (
        f"**misses**: not faster than {'; '.join(faster)}" if faster else "faster than all: holds"
    )


def print_costs(options: argparse.Namespace) -> None:
    """Print the table."""
    height, width = options.size
    measured = [] if options.count else [f"images/s, {height} x {width}", "MB"]
    heads = ["network", "parameters, M", "GMACs", "atrous convolutions", *measured, "claim"]
    print(f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 2)}---|")
    found = {
        name: (*costs(name), *(() if options.count else speed(name, options))) for name in NETWORKS
    }
    digits = (2, 1, 0, 2, 0)
    for name, values in found.items():
        cells = [f"{value:.{n}f}" for value, n in zip(values, digits, strict=False)]
        print(f"| {' | '.join([name, *cells, verdict(name, found)])} |")


def train(stem: str, mode: str, seed: int, options: argparse.Namespace, folder: str) -> float:
    """Train a config of CamVid for `--steps`; returns mIoU in percent after the last one."""
    from seglab.cli import build_experiment

    experiment = build_experiment([
        *("--config", str(CONFIGS / "camvid" / f"{stem}.yaml"), "--data.root", options.camvid),
        *("--trainer.max_epochs", "-1", "--trainer.max_steps", str(options.steps)),
        *("--trainer.limit_val_batches", "0", "--trainer.logger", "false"),
        *("--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"),
        *("--trainer.default_root_dir", folder, "--seed_everything", str(seed)),
        *(["--without", "[scale_equalization]"] if mode == "none" else []),
        *("--scale_equalization.verbose", "false"),
    ])  # fmt: skip
    experiment.trainer.fit(experiment.model, experiment.datamodule)
    experiment.trainer.limit_val_batches = 1.0
    (result,) = experiment.trainer.validate(experiment.model, experiment.datamodule, verbose=False)
    return 100 * result["val/mIoU"]


def print_camvid(options: argparse.Namespace) -> None:
    """Print mIoU on CamVid, with equalization and without."""
    print(f"| network | equalization | mIoU after {options.steps} steps, seeds {options.seeds} |")
    print("|---|---|--:|")
    for stem in options.networks:
        for mode in ("none", "as in the config"):
            with tempfile.TemporaryDirectory() as folder:
                scores = [train(stem, mode, seed, options, folder) for seed in options.seeds]
            spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            print(f"| {stem} | {mode} | {statistics.mean(scores):.2f}{spread} |", flush=True)


def rows_of_p5(coarsest: int) -> int:
    """Rows of P5 from which the middle pixel of P2 takes, in one BiFPN cell up to `coarsest`."""
    torch.manual_seed(0)
    neck = BiFPN((4, 4, 4, 4), 4, repeats=1, levels=(2, coarsest)).eval()
    inputs = [torch.randn(1, 4, 2048 >> i, 128 >> i, requires_grad=True) for i in (2, 3, 4, 5)]
    neck(inputs)[0][0, :, 256, 16].square().sum().backward()
    assert inputs[3].grad is not None
    rows = (inputs[3].grad.abs().sum((0, 1, 3)) > 0).nonzero()
    return int(rows.max() - rows.min()) + 1


def print_receptive_field() -> None:
    """Print rows of P5, and in pixels of the image, against the coarsest level."""
    print("| levels | rows of P5 (of 64) | pixels |\n|---|--:|--:|")
    for coarsest in range(5, 10):
        rows = rows_of_p5(coarsest)
        print(f"| P2 to P{coarsest} | {rows} | {32 * rows} |")


def main() -> None:
    """Print the table asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", action="store_true", help="measure nothing")
    parser.add_argument("--camvid", metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=1350)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--networks", nargs="+",
        default=["pspnet_resnet18", "upernet_resnet18", "eseg_resnet18", "rsp_resnet18"],
    )  # fmt: skip
    parser.add_argument("--receptive-field", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.receptive_field:
        print_receptive_field()
    elif options.camvid:
        print_camvid(options)
    else:
        print_costs(options)


if __name__ == "__main__":
    main()
