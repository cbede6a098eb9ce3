"""What equalizing costs: before training (calibration) and in every step (each form of it).

    python benchmarks/equalization.py

Calibration is timed against the plain forward pass of the same batches in train mode without
gradients (fusion layers as resize, concatenate, convolve, as they are while being measured).
Steps are forward, backward and optimizer on the same batch. All in one process, in turn; medians
and quartiles of the ratio pair by pair. UPerNet-ResNet-18, 128 decoder channels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scale_equalization import ScaleEqualizer, equalize_, find_fusions, measure_scales
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import UPerHead


def network(device: torch.device, channels: int = 128) -> Segmenter:
    """UPerNet-ResNet-18, the same weights every time."""
    torch.manual_seed(0)
    encoder = TimmEncoder("resnet18", pretrained=False)
    return Segmenter(encoder, UPerHead(encoder.channels, 19, channels=channels)).to(device)


class Watched(TorchFunctionMode):
    """Does nothing; under any such mode, fusion layers run as ordinary operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Entrance(nn.Module):
    """A fusion layer with one module in front of every branch: the explicit forms."""

    def __init__(self, fuse: nn.Module, gates: list[nn.Module]) -> None:
        super().__init__()
        self.fuse, self.gates = fuse, nn.ModuleList(gates)

    def forward(self, features: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Resize, pass each branch through its gate, go on as before."""
        size = size or features[0].shape[-2:]
        resized = [
            x if x.shape[-2:] == torch.Size(size) else F.interpolate(x, size, mode="bilinear")
            for x in features
        ]
        return self.fuse([gate(x) for gate, x in zip(self.gates, resized, strict=True)], size)


def with_gates(model: Segmenter, make: Callable[[dict], nn.Module], rows: list[dict]) -> Segmenter:
    """The network with a gate made from each row of a report."""
    for name in dict.fromkeys(row["fusion"] for row in rows):
        gates = [make(row) for row in rows if row["fusion"] == name]
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, Entrance(getattr(owner, child), gates))
    return model


def variants(batches: list[Tensor]) -> dict[str, Segmenter]:
    """Every form of the same equalization, and two controls."""
    device = batches[0].device
    rows = list(measure_scales(network(device), batches).rows)
    fold, reparametrize = network(device), network(device)
    equalize_(fold, batches)
    equalize_(reparametrize, batches, mode="reparametrize")
    return {
        "baseline": network(device),
        "fold": fold,
        "reparametrize": reparametrize,
        "explicit module": with_gates(
            network(device), lambda row: ScaleEqualizer(row["mean"], row["std"]).to(device), rows
        ),
        "batch norm after upsampling": with_gates(
            network(device),
            lambda row: nn.BatchNorm2d(row["stop"] - row["start"]).to(device),
            rows,
        ),
    }


def step(model: Segmenter, image: Tensor) -> Callable[[], None]:
    """One training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model.train()

    def run() -> None:
        optimizer.zero_grad()
        model(image).square().mean().backward()
        optimizer.step()

    return run


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def side_by_side(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times of all runs in turn, after one warm-up each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def rows_of(times: dict[str, list[float]]) -> list[str]:
    """Markdown rows: median milliseconds, ratio to the first run pair by pair."""
    first = next(iter(times.values()))
    lines = []
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        spread = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        lines.append(f"| {name} | {1000 * statistics.median(values):.0f} | {spread} |")
    return lines


def calibration(batches: list[Tensor], repeats: int) -> list[str]:
    """Plain forward passes against measuring the same batches."""
    model = network(batches[0].device)
    fusions = find_fusions(model, batches[0])
    model.train()

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    def watched() -> None:
        with Watched():
            forward()

    return rows_of(
        side_by_side(
            {
                f"plain forward, {len(batches)} batches": watched,
                "forward with fused fusion layers": forward,
                "measure_scales": lambda: measure_scales(model, batches, fusions, tolerance=0),
                "find and measure": lambda: measure_scales(model, batches, tolerance=0),
            },
            repeats,
        )
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    shape = (4, 3, options.size, options.size)
    batches = [torch.rand(shape).to(options.device) * 255 for _ in range(options.batches)]
    print(f"{torch.get_num_threads()} threads, batch 4, {options.size} x {options.size}\n")
    print("| calibration | ms | ratio (quartiles) |\n|---|---|---|")
    print("\n".join(calibration(batches, options.repeats)))
    print("\n| training step | ms | ratio (quartiles) |\n|---|---|---|")
    runs = {name: step(model, batches[0]) for name, model in variants(batches[:8]).items()}
    print("\n".join(rows_of(side_by_side(runs, 3 * options.repeats))))


if __name__ == "__main__":
    main()
