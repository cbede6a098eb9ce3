"""Whole training steps with and without fusion and banded loss: time, peak memory, loss curve.

    python benchmarks/training_step.py [--crop 512] [--batch 2] [--threads 2] [--repeats 5]
    python benchmarks/training_step.py --curve 60 --root /path/to/camvid

The plain way resizes, concatenates, convolves, and makes full-size logits, as MMSegmentation does,
with the same modules. Both ways in one process, in turn, medians. `--profile` lists the operators
of one step of each. `--curve` trains a small UPerNet on a folder of images and masks from one seed,
each way, and prints both losses and their difference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from seglab.data import FolderDataModule
from seglab.losses import CrossEntropy
from seglab.models import Segmenter, TimmEncoder
from seglab.models.fusion import FusionConv2d
from seglab.models.heads import ASPPHead, FCNHead, PSPHead, SepASPPHead, UPerHead

N_CLASSES = 150


def network(name: str) -> Segmenter:
    """A recipe's network with its auxiliary head; random weights."""
    encoder_name, stride, head = {
        "UPerNet-Swin-T": ("swin_tiny_patch4_window7_224", 32, UPerHead),
        "UPerNet-ConvNeXt-T": ("convnext_tiny", 32, UPerHead),
        "PSPNet-R101-D8": ("resnet101", 8, PSPHead),
        "DeepLabV3-R101-D8": ("resnet101", 8, ASPPHead),
        "DeepLabV3+-R101-D8": ("resnet101", 8, SepASPPHead),
        "FCN-R101-D8": ("resnet101", 8, FCNHead),
    }[name]
    encoder = TimmEncoder(encoder_name, output_stride=stride)
    auxiliary = FCNHead(
        encoder.channels, N_CLASSES, channels=256, in_index=2, num_convs=1, concat_input=False
    )
    return Segmenter(encoder, head(encoder.channels, N_CLASSES), auxiliary)


class Trainer:
    """The training step of `SegmentationTask`, either way."""

    def __init__(self, model: Segmenter, lr: float = 1e-4) -> None:
        self.model = model.train()
        self.loss = CrossEntropy()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        self.fusions = [m for m in model.modules() if isinstance(m, FusionConv2d)]

    def step(self, image: Tensor, target: Tensor, plain: bool, fused: str | None = None) -> Tensor:
        """One optimizer step; returns the loss."""
        for conv in self.fusions:
            conv.force = "plain" if plain else fused if conv.groups == 1 else None
        main, *auxiliary = (self._loss(x, target, plain) for x in self.model.decode(image))
        total = main + 0.4 * sum(auxiliary)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return total.detach()

    def _loss(self, logits: Tensor, target: Tensor, plain: bool) -> Tensor:
        if not plain:
            return self.loss.on_upsampled(logits, target)
        full = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
        return self.loss(full, target)


def peak_bytes(step: Callable[[], object], top: int) -> int:
    """Highest sum of allocations not yet freed during a step; prints its `top` operators."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    held = peak = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    operators = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)[:top]
    for operator in operators:
        print(
            f"    {operator.self_cpu_time_total / 1e3:9.1f} ms {operator.count:5d} {operator.key}"
        )
    return peak


def compare(name: str, options: argparse.Namespace) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    trainer = Trainer(network(name))
    size = (options.batch, options.crop, options.crop)
    image = torch.randint(0, 256, (size[0], 3, *size[1:]), dtype=torch.uint8)
    target = torch.randint(0, N_CLASSES, size)
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * options.repeats + 2):
        start = clock()
        trainer.step(image, target, plain=turn % 2 == 0)
        times[turn % 2 == 0].append(clock() - start)
    plain, ours = (statistics.median(times[key][1:]) for key in (True, False))
    top = 12 if options.profile else 0
    peaks = [peak_bytes(lambda p=p: trainer.step(image, target, p), top) for p in (True, False)]
    return (
        f"| {name} | {plain * 1e3:.0f} | {ours * 1e3:.0f} | {plain / ours:.2f} "
        f"| {peaks[0] / 1e6:.0f} | {peaks[1] / 1e6:.0f} | {peaks[1] / peaks[0]:.2f} |"
    )


def curve(root: str, n_steps: int, plain: bool, dtype: torch.dtype) -> Iterator[float]:
    """Losses of a small UPerNet trained from one seed."""
    torch.manual_seed(0)
    data = FolderDataModule(
        root, [str(k) for k in range(11)], value_map={11: 255}, scale=(240, 180),
        crop_size=(160, 224), batch_size=8, num_workers=0,
    )  # fmt: skip
    data.setup("fit")
    encoder = TimmEncoder("resnet18")
    head = UPerHead(encoder.channels, 11, channels=32, dropout=0.0)
    trainer = Trainer(Segmenter(encoder, head).to(dtype), lr=1e-3)
    for _, batch in zip(range(n_steps), data.train_dataloader(), strict=False):
        yield trainer.step(batch["image"], batch["mask"].long(), plain, "fused").item()


def main() -> None:
    """Print the table, or the two curves."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=["UPerNet-Swin-T", "PSPNet-R101-D8"])
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--curve", type=int)
    parser.add_argument("--root", default="data/camvid")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.curve:
        dtype = getattr(torch, options.dtype)
        ways = (curve(options.root, options.curve, plain, dtype) for plain in (True, False))
        for index, (plain, fused) in enumerate(zip(*ways, strict=True)):
            print(f"{index:4d} plain {plain:.6f} fused {fused:.6f} difference {fused - plain:+.1e}")
        return
    print(f"torch {torch.__version__}, {vars(options)}")
    print("| network | plain ms | ours ms | speed | peak MB | ours | ratio |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name in options.networks:
        print(compare(name, options), flush=True)


if __name__ == "__main__":
    main()
