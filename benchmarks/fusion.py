"""Fusion without upsampling against the plain way: operator, heads, loss, argmax.

    python benchmarks/fusion.py [--crop 512] [--batch 2] [--threads 2] [--device cpu]

The plain way is F.interpolate, torch.cat, F.conv2d on the same modules; full-size logits for loss
and argmax. For heads, MMSegmentation's own with the same weights too, where it can be imported
(`mmseg_reference.py` says how). Forward and backward pass (argmax: no gradient), all ways in one
process, in turn. Memory: the peak of what one pass allocates, from the profiler's records. For
figures to quote, nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mmseg_reference as reference
import torch
import torch.nn.functional as F
from side_by_side import HEADER, peak_bytes, rows, time_in_turn
from torch import Tensor, nn

from seglab.losses import CrossEntropy
from seglab.models.heads import ASPPHead, FCNHead, Head, PSPHead, SepASPPHead, UPerHead
from seglab.operators.fusion_conv import FusionConv2d
from seglab.operators.upsampled import upsampled_argmax

SWIN_T, RESNET = (96, 192, 384, 768), (256, 512, 1024, 2048)
N_CLASSES = 150


@dataclass(frozen=True)
class Case:
    """One row: forward passes by way, and what to differentiate them by."""

    name: str
    ways: dict[str, Callable[[], Tensor]]
    leaves: dict[str, Sequence[Tensor]]

    def run(self, way: str) -> None:
        """Forward and, where there is something to differentiate by, backward pass."""
        leaves = list(self.leaves.get(way, []))
        with torch.set_grad_enabled(bool(leaves)):
            y = self.ways[way]()
        if leaves:
            torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)

    def error(self) -> float:
        """Largest difference between any two ways, relative to the largest value."""
        with torch.no_grad():
            found = [way().double() for way in self.ways.values()]
        return max(float((x - found[-1]).abs().max() / found[-1].abs().max()) for x in found)


def maps(batch: int, shapes: Sequence[tuple[int, int]], device: str) -> list[Tensor]:
    """Random maps (batch, channels, side, side) that want gradients."""
    return [torch.randn(batch, c, s, s, device=device, requires_grad=True) for c, s in shapes]


def operator(name: str, batch: int, shapes: Sequence[tuple[int, int]], device: str) -> Case:
    """A 3x3 convolution to 512 channels over branches of (channels, side)."""
    conv = FusionConv2d(sum(c for c, _ in shapes), 512, 3, padding=1, bias=False).to(device)
    branches = maps(batch, shapes, device)
    leaves = [*branches, conv.weight]
    return Case(
        name,
        {"plain": lambda: conv(branches, force="plain"), "ours": lambda: conv(branches)},
        {"plain": leaves, "ours": leaves},
    )


def head(name: str, ours: Head, batch: int, sides: Sequence[int], device: str) -> Case:
    """A whole head on features of these sides, in training."""
    ours = ours.to(device)
    features = maps(batch, list(zip(ours.in_channels, sides, strict=True)), device)
    fusions = [m for m in ours.modules() if isinstance(m, FusionConv2d)]

    def forward(plain: bool) -> Tensor:
        for conv in fusions:
            conv.force = "plain" if plain else None
        return ours(features)

    ways = {"plain": lambda: forward(True), "ours": lambda: forward(False)}
    leaves = {way: [*features, *ours.parameters()] for way in ways}
    if reference.is_there():
        theirs = their_head(ours).to(device)
        ways = {"MMSegmentation": lambda: theirs(features), **ways}
        leaves["MMSegmentation"] = [*features, *theirs.parameters()]
    return Case(name, ways, leaves)


def their_head(ours: Head) -> nn.Module:
    """MMSegmentation's head of the same name and weights."""
    config = reference.head_config(type(ours).__name__, ours.in_channels, N_CLASSES)
    theirs: nn.Module = reference.builder()(config)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def logits(batch: int, crop: int, device: str) -> Iterator[Case]:
    """Loss, and argmax, of logits at a quarter of the crop."""
    low = maps(batch, [(N_CLASSES, crop // 4)], device)[0]
    target = torch.randint(0, N_CLASSES, (batch, crop, crop), device=device)
    loss = CrossEntropy()

    def up() -> Tensor:
        return F.interpolate(low, size=(crop, crop), mode="bilinear", align_corners=False)

    ways = {"plain": lambda: loss(up(), target), "ours": lambda: loss.on_upsampled(low, target)}
    yield Case(f"loss, {N_CLASSES} classes", ways, {way: [low] for way in ways})
    ways = {"plain": lambda: up().argmax(1), "ours": lambda: upsampled_argmax(low, (crop, crop))}
    yield Case(f"argmax, {N_CLASSES} classes", ways, {})


def cases(crop: int, batch: int, device: str) -> Iterator[Case]:
    """All rows, made one at a time."""
    s4, s8, s16, s32 = (crop // stride for stride in (4, 8, 16, 32))
    pyramid = [(512, side) for side in (s4, s8, s16, s32)]
    yield operator("operator: UPerHead fpn_bottleneck", batch, pyramid, device)
    pooled = [(2048, s8), *((512, bins) for bins in (1, 2, 3, 6))]
    yield operator("operator: PSPHead bottleneck, D8", batch, pooled, device)
    uper = UPerHead(SWIN_T, N_CLASSES, dropout=0.0)
    yield head("UPerHead, Swin-T", uper, batch, (s4, s8, s16, s32), device)
    for kind in (PSPHead, ASPPHead, SepASPPHead, FCNHead):
        ours = kind(RESNET, N_CLASSES, dropout=0.0)
        yield head(f"{kind.__name__}, R101-D8", ours, batch, (s4, s8, s8, s8), device)
    yield from logits(batch, crop, device)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {vars(options)}")
    print(HEADER.format("case", "ms", "peak MB"))
    for case in cases(options.crop, options.batch, options.device):
        if options.only not in case.name:
            continue
        name = f"{case.name} (differs by {case.error():.0e})"
        passes = {way: partial(case.run, way) for way in case.ways}
        times = time_in_turn(passes, options.repeats)
        peaks = {way: peak_bytes(p, device=options.device) for way, p in passes.items()}
        print(rows(name, times, peaks), flush=True)


if __name__ == "__main__":
    main()
