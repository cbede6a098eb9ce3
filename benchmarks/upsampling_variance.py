"""Does bilinear upsampling shrink variance as the theory says? Table, and the paper's figure.

    python benchmarks/upsampling_variance.py --figure docs/upsampling_variance.png

As in the authors' script: 16 x 256 maps of 128 x 128 normal values with mean 0.3989 and variance
0.01 to 0.99, upsampled 2, 4 and 8 times, population variance over all elements. Fewer maps are
drawn here (--maps), which widens only the noise. The lines are the closed form for independent
values: along one axis of n values with align_corners=False, ((n - 1) v + 1) / n with
v = 2/3 - 1/(6 r^2) for even r and 2/3 + 1/(3 r^2) for odd r; with align_corners=True,
(M (2 m^2 + 1) / (3 m^2) + 1) / (M + 1) with M = r n - 1 and m = M / gcd(n - 1, M). In two
dimensions the square of it.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F

RATIOS = (2, 4, 8)
WIDTH = 128


def closed_form(ratio: int, width: int, align_corners: bool) -> float:
    """Variance after over variance before, of independent values on a square map."""
    if align_corners:
        steps = ratio * width - 1
        reduced = steps // math.gcd(width - 1, steps)
        axis = (steps * (2 * reduced**2 + 1) / (3 * reduced**2) + 1) / (steps + 1)
    else:
        even = 2 / 3 - 1 / (6 * ratio**2)
        odd = 2 / 3 + 1 / (3 * ratio**2)
        axis = ((width - 1) * (even if ratio % 2 == 0 else odd) + 1) / width
    return axis**2


def measured(ratio: int, variance: float, maps: int, align_corners: bool) -> float:
    """Variance of upsampled normal values, over all elements."""
    values = torch.randn(1, maps, WIDTH, WIDTH) * variance**0.5 + 0.3989
    up = F.interpolate(values, scale_factor=ratio, mode="bilinear", align_corners=align_corners)
    return up.var(correction=0).item()


def table(maps: int) -> str:
    """Closed form beside measurement, for both conventions."""
    lines = ["| ratio | align_corners | closed form | measured |", "|---|---|---|---|"]
    for align_corners in (False, True):
        for ratio in RATIOS:
            expected = closed_form(ratio, WIDTH, align_corners)
            found = measured(ratio, 0.34085, maps, align_corners) / 0.34085
            lines.append(f"| {ratio} | {align_corners} | {expected:.6f} | {found:.5f} |")
    return "\n".join(lines)


def figure(path: str, maps: int) -> None:
    """Variance after against variance before: dots measured, lines closed form."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    before = [0.01 + 0.07 * i for i in range(15)]
    _, axes = plt.subplots(figsize=(5, 4))
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="no upsampling")
    for ratio, colour in zip(RATIOS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
        line = [closed_form(ratio, WIDTH, align_corners=False) * v for v in before]
        dots = [measured(ratio, v, maps, align_corners=False) for v in before]
        axes.plot(before, line, color=colour, label=f"{ratio}x, closed form")
        axes.plot(before, dots, "o", color=colour, markersize=3, label=f"{ratio}x, measured")
    axes.set_xlabel("variance before bilinear upsampling")
    axes.set_ylabel("variance after")
    axes.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def main() -> None:
    """Print the table; draw the figure if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", help="write the figure to this PNG file")
    parser.add_argument("--maps", type=int, default=16, help="number of 128 x 128 maps")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(table(options.maps))
    if options.figure:
        figure(options.figure, options.maps)
        print(f"figure: {options.figure}")


if __name__ == "__main__":
    main()
