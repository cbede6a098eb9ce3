"""Fusion without upsampling against the plain way: operator, heads, loss, argmax.

    python benchmarks/fusion.py [--crop 512] [--batch 1] [--threads 2] [--repeats 5] [--device cpu]

The plain way is what MMSegmentation does, on the same modules: F.interpolate, torch.cat, F.conv2d;
full-size logits for loss and argmax. Forward and backward pass (argmax: no gradient), both ways in
one process, in turn, medians of the wall clock. Memory: the peak of what one pass allocates, from
the profiler's records, and what autograd keeps between the passes. For figures to quote, nothing
else may run on the machine. `--clock thread` with `--threads 1` counts processor time instead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from seglab.losses import CrossEntropy
from seglab.models.fusion import FusionConv2d
from seglab.models.heads import ASPPHead, Head, PSPHead, UPerHead
from seglab.operators.upsampled import upsampled_argmax

SWIN_T, RESNET = (96, 192, 384, 768), (256, 512, 1024, 2048)
N_CLASSES = 150


@dataclass(frozen=True)
class Case:
    """One row: a forward pass, the plain way or not, and what to differentiate it by."""

    name: str
    forward: Callable[[bool], Tensor]
    leaves: Sequence[Tensor]

    def run(self, plain: bool) -> None:
        """Forward and, where there is something to differentiate by, backward pass."""
        with torch.set_grad_enabled(bool(self.leaves)):
            y = self.forward(plain)
        if self.leaves:
            torch.autograd.grad(y, list(self.leaves), torch.ones_like(y), allow_unused=True)


def maps(batch: int, shapes: Sequence[tuple[int, int]], device: str) -> list[Tensor]:
    """Random maps (batch, channels, side, side) that want gradients."""
    return [torch.randn(batch, c, s, s, device=device, requires_grad=True) for c, s in shapes]


def operator(name: str, batch: int, shapes: Sequence[tuple[int, int]], device: str) -> Case:
    """A 3x3 convolution to 512 channels over branches of (channels, side)."""
    conv = FusionConv2d(sum(c for c, _ in shapes), 512, 3, padding=1, bias=False).to(device)
    branches = maps(batch, shapes, device)
    return Case(
        name,
        lambda plain: conv(branches, force="plain" if plain else None),
        [*branches, conv.weight],
    )


def head(name: str, head: Head, batch: int, sides: Sequence[int], device: str) -> Case:
    """A whole head on features of these sides, in training."""
    head = head.to(device)
    features = maps(batch, list(zip(head.in_channels, sides, strict=True)), device)
    fusions = [m for m in head.modules() if isinstance(m, FusionConv2d)]
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # batch 1 has no statistics in global pooling

    def forward(plain: bool) -> Tensor:
        for conv in fusions:
            conv.force = "plain" if plain else None
        return head(features)

    return Case(name, forward, [*features, *head.parameters()])


def logits(batch: int, crop: int, device: str) -> Iterator[Case]:
    """Loss, and argmax, of logits at a quarter of the crop."""
    low = maps(batch, [(N_CLASSES, crop // 4)], device)[0]
    target = torch.randint(0, N_CLASSES, (batch, crop, crop), device=device)
    loss = CrossEntropy()

    def up() -> Tensor:
        return F.interpolate(low, size=(crop, crop), mode="bilinear", align_corners=False)

    yield Case(
        f"loss, {N_CLASSES} classes",
        lambda plain: loss(up(), target) if plain else loss.on_upsampled(low, target),
        [low],
    )
    yield Case(
        f"argmax, {N_CLASSES} classes",
        lambda plain: up().argmax(1) if plain else upsampled_argmax(low, (crop, crop)),
        [],
    )


def cases(crop: int, batch: int, device: str) -> Iterator[Case]:
    """All rows, made one at a time."""
    s4, s8, s16, s32 = (crop // stride for stride in (4, 8, 16, 32))
    pyramid = [(512, side) for side in (s4, s8, s16, s32)]
    yield operator("operator: UPerHead fpn_bottleneck", batch, pyramid, device)
    pooled = [(2048, s8), *((512, bins) for bins in (1, 2, 3, 6))]
    yield operator("operator: PSPHead bottleneck, D8", batch, pooled, device)
    yield head("UPerHead, Swin-T", UPerHead(SWIN_T, N_CLASSES), batch, (s4, s8, s16, s32), device)
    sides = (s4, s8, s8, s8)
    yield head("PSPHead, R101-D8", PSPHead(RESNET, N_CLASSES), batch, sides, device)
    yield head("ASPPHead, R101-D8", ASPPHead(RESNET, N_CLASSES), batch, sides, device)
    yield from logits(batch, crop, device)


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Median seconds, plain and ours, in turn."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * repeats + 2):
        plain = turn % 2 == 0
        start = clock()
        case.run(plain)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times[plain].append(clock() - start)
    return statistics.median(times[True][1:]), statistics.median(times[False][1:])


def peak_bytes(case: Case, plain: bool, device: str) -> int:
    """Highest sum of allocations not yet freed during one pass."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run(plain)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        case.run(plain)
    held = peak = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def kept_bytes(case: Case, plain: bool) -> int:
    """What autograd keeps from the forward to the backward pass, leaves apart."""
    own = {x.untyped_storage().data_ptr() for x in case.leaves}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = case.forward(plain)
    del y
    return sum(kept.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "thread"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.perf_counter if options.clock == "wall" else time.thread_time
    print(f"torch {torch.__version__}, {vars(options)}")
    print("| case | plain ms | ours ms | speed | peak MB | ours | ratio | kept MB | ours |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for case in cases(options.crop, options.batch, options.device):
        seconds = measure(case, options.repeats, clock)
        peaks = [peak_bytes(case, plain, options.device) for plain in (True, False)]
        kept = [kept_bytes(case, plain) for plain in (True, False)]
        cells = [f"{seconds[0] * 1e3:.0f}", f"{seconds[1] * 1e3:.0f}"]
        cells.append(f"{seconds[0] / seconds[1]:.2f}")
        cells += [f"{peaks[0] / 1e6:.0f}", f"{peaks[1] / 1e6:.0f}", f"{peaks[1] / peaks[0]:.2f}"]
        cells += [f"{size / 1e6:.0f}" for size in kept]
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
