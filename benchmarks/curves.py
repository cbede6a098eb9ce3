"""Training with and without the operators, from one seed: the same curve, as far as rounding goes.

    python benchmarks/curves.py --root /path/to/camvid [--steps 135] [--picture docs/curves.png]

A small UPerNet on street images (or any folder of images and masks), with fusion and loss each way.
Rounding alone drives two trainings apart, so each difference is put beside that of a control: the
plain way again, from initial weights that are off by one rounding. `--dtype float64` shows that
nothing else does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import matplotlib as mpl
import torch
from plain_way import bare_task
from torch import Tensor

from seglab.data import FolderDataModule
from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import UPerHead
from seglab.optim import build_optimizer
from seglab.task import SegmentationTask

N_CLASSES = 11
WAYS = ("plain", "fused", "control")


def make_task(way: str, dtype: torch.dtype) -> SegmentationTask:
    """The same weights each way, but for the control's last bit."""
    torch.manual_seed(0)
    encoder = TimmEncoder("resnet18")
    network = Segmenter(encoder, UPerHead(encoder.channels, N_CLASSES, channels=32, dropout=0.0))
    network.to(dtype)
    if way == "control":
        with torch.no_grad():
            for weight in network.parameters():
                weight.mul_(1 + torch.finfo(dtype).eps)
    return bare_task(network, "fused" if way == "fused" else "plain")


def losses(way: str, options: argparse.Namespace) -> Iterator[float]:
    """Training losses, step by step."""
    task = make_task(way, getattr(torch, options.dtype))
    optimizer = build_optimizer(task.network, torch.optim.AdamW)
    for batch in batches(options):
        loss: Tensor = task.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def batches(options: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """`--steps` batches, epoch after epoch, the same for each way."""
    data = FolderDataModule(
        options.root, [str(k) for k in range(N_CLASSES)], value_map={N_CLASSES: 255},
        scale=(240, 180), crop_size=(160, 224), batch_size=8, num_workers=0,
    )  # fmt: skip
    data.setup("fit")
    left = options.steps
    for epoch in range(options.steps):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            if not left:
                return
            left -= 1
            yield batch


def draw(found: dict[str, list[float]], path: str) -> None:
    """The curves, and what they differ by."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(7, 6))
    for way, style in zip(WAYS, ("-", "--", ":"), strict=True):
        above.plot(found[way], style, label=way)
    for way in WAYS[1:]:
        difference = [abs(a - b) for a, b in zip(found[way], found["plain"], strict=True)]
        below.semilogy(difference, label=f"|{way} - plain|")
    above.set_ylabel("training loss")
    below.set(xlabel="step", ylabel="difference")
    above.legend(), below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Print a table of losses and differences; draw it if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default="data/camvid")
    parser.add_argument("--steps", type=int, default=135)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| step | plain | fused | control | fused - plain | control - plain |")
    print("|--:|--:|--:|--:|--:|--:|")
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for step, values in enumerate(zip(*(losses(w, options) for w in WAYS), strict=True)):
        for way, value in zip(WAYS, values, strict=True):
            found[way].append(value)
        if step < 5 or step % 10 == 9:
            plain, fused, control = values
            cells = [f"{x:.6f}" for x in values]
            cells += [f"{fused - plain:+.0e}", f"{control - plain:+.0e}"]
            print(f"| {step + 1} | {' | '.join(cells)} |", flush=True)
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
