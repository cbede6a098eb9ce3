"""How far a BiFPN sees with more levels, and what RSP's attention keeps in memory: tables, figure.

    python benchmarks/context.py --figure docs/context.png

Receptive field: in a single cell of a BiFPN up to P5, ..., P9, on an input of 2048 rows, the rows
of P5 that reach the middle pixel of P2. Row i of image i is made NaN, and where the pixel is NaN
the row reaches it, whatever the weights. The pyramid is looked at alone: EfficientNet's squeeze and
excitation is global, so that every pixel of an image reaches every other in the encoder already.

Memory: floats for each fine pixel that one extractor keeps for the backward pass, each storage
once, its inputs among them; and the most that it holds at a time without gradients. Beside it what
unfolding keys and values over the window would keep on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from side_by_side import peak_bytes
from torch import Tensor

from seglab.models.heads.rsp import RelationalSemanticsExtractor
from seglab.models.necks import BiFPN

ROWS = 2048
WINDOWS = (1, 3, 5, 7)
FORMS = ((64, 4), (64, 8), (128, 8))  # channels, heads


def rows_that_reach(coarsest: int) -> int:
    """Rows of P5, of 64, that the middle pixel of P2 takes from in a cell up to `coarsest`."""
    torch.manual_seed(0)
    neck = BiFPN((4, 4, 4, 4), 4, repeats=1, levels=(2, coarsest)).eval()
    n = ROWS >> 5
    levels = [torch.zeros(n, 4, ROWS >> i, 128 >> i) for i in (2, 3, 4, 5)]
    levels[3][torch.arange(n), :, torch.arange(n)] = float("nan")
    with torch.inference_mode():
        middle = neck(levels)[0][:, :, ROWS >> 3, 16]
    rows = middle.isnan().any(1).nonzero()
    return int(rows.max() - rows.min()) + 1


def extractor(
    window: int, heads: int, channels: int, side: int
) -> tuple[RelationalSemanticsExtractor, Tensor, Tensor]:
    """An extractor with half as many channels of keys, and its two maps."""
    module = RelationalSemanticsExtractor(channels, channels // 2, window, heads)
    fine = torch.randn(1, channels, side, side)
    return module, fine, torch.randn(1, channels, side // 2, side // 2)


def floats_kept(window: int, heads: int, channels: int, side: int = 64) -> float:
    """Floats for each fine pixel that are kept for the backward pass."""
    module, fine, coarse = extractor(window, heads, channels, side)
    kept: dict[int, Tensor] = {}  # held, so that no storage is freed and its address used again

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module(fine, coarse)
    return sum(x.untyped_storage().nbytes() for x in kept.values()) / 4 / side**2


def floats_held(window: int, heads: int, channels: int, side: int = 64) -> float:
    """Floats for each fine pixel that are held at a time when nothing is kept."""
    module, fine, coarse = extractor(window, heads, channels, side)
    with torch.inference_mode():
        return peak_bytes(lambda: module(fine, coarse)) / 4 / side**2


def unfolded(window: int, channels: int) -> float:
    """Floats for each fine pixel of keys and values unfolded over the window."""
    return window**2 * (channels + channels // 2) / 4


def receptive_fields() -> list[int]:
    """Pixels of the image, up to P5 first."""
    print("| levels | rows of P5, of 64 | pixels of 2048 |\n|---|--:|--:|")
    found = []
    for coarsest in range(5, 10):
        rows = rows_that_reach(coarsest)
        found.append(32 * rows)
        print(f"| P2 to P{coarsest} | {rows} | {32 * rows} |", flush=True)
    return found


def memory() -> dict[tuple[int, int], list[float]]:
    """Floats kept for each fine pixel, by channels and heads, one for each window."""
    heads = [
        "channels, heads",
        "window",
        "kept",
        "k^2 x heads",
        "unfolding would add",
        "held",
    ]
    print(f"\n| {' | '.join(heads)} |\n|---|--:|--:|--:|--:|--:|")
    found: dict[tuple[int, int], list[float]] = {}
    for channels, n in FORMS:
        for window in WINDOWS:
            kept, held = floats_kept(window, n, channels), floats_held(window, n, channels)
            found.setdefault((channels, n), []).append(kept)
            cells = [kept, window**2 * n, unfolded(window, channels), held]
            line = " | ".join(f"{value:.0f}" for value in cells)
            print(f"| {channels}, {n} | {window} | {line} |", flush=True)
    return found


def figure(path: str, pixels: Sequence[int], kept: dict[tuple[int, int], list[float]]) -> None:
    """Left the receptive field by levels, right the memory by window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.bar([f"P2-P{i}" for i in range(5, 10)], pixels, color="tab:blue")
    left.set_ylabel("pixels that reach the middle one, of 2048")
    left.set_title("one BiFPN cell", fontsize=10)
    areas = [window**2 for window in WINDOWS]
    for (channels, n), values in kept.items():
        (line,) = right.plot(areas, values, "o-", label=f"{channels} channels, {n} heads")
        pairs = zip(WINDOWS, values, strict=True)
        other = [value + unfolded(window, channels) for window, value in pairs]
        right.plot(areas, other, ":", color=line.get_color(), label="the same, unfolded")
    right.set_xticks(areas, [f"{window} x {window}" for window in WINDOWS])
    right.set_xlabel("window")
    right.set_ylabel("floats kept for each fine pixel")
    right.set_title("attention of RSP", fontsize=10)
    right.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(path, dpi=120)


def main() -> None:
    """Print the tables; draw the figure if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", help="write the figure to this PNG file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pixels, kept = receptive_fields(), memory()
    if options.figure:
        figure(options.figure, pixels, kept)
        print(f"\nfigure: {options.figure}")


if __name__ == "__main__":
    main()
