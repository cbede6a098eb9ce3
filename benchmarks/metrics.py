"""Counting IoU: `SegmentationMetrics`, torchmetrics' JaccardIndex, MMSegmentation's IoUMetric.

    python benchmarks/metrics.py [--classes 150] [--size 512] [--batch 4] [--repeats 7]

Seconds of the processor for one update, in turn, medians; ratios turn by turn. All three must find
the same mean IoU, which is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import mmseg_reference as reference
import torch
from torch import Tensor
from torchmetrics import JaccardIndex

from seglab.metrics import SegmentationMetrics


def ours(prediction: Tensor, target: Tensor, n_classes: int) -> Callable[[], float]:
    """Our metric."""
    metric = SegmentationMetrics(n_classes)

    def way() -> float:
        metric.reset()
        metric.update(prediction, target)
        return float(metric.compute()["mIoU"])

    return way


def torchmetrics(prediction: Tensor, target: Tensor, n_classes: int) -> Callable[[], float]:
    """JaccardIndex, which its documentation shows with ids."""
    metric = JaccardIndex(task="multiclass", num_classes=n_classes, ignore_index=255)

    def way() -> float:
        metric.reset()
        metric.update(prediction, target)
        return float(metric.compute())

    return way


def mmsegmentation(prediction: Tensor, target: Tensor, n_classes: int) -> Callable[[], float]:
    """IoUMetric, image by image, as its loop calls it."""
    reference.builder()
    from mmseg.evaluation import IoUMetric

    def way() -> float:
        areas = [
            IoUMetric.intersect_and_union(found, labels, n_classes, 255)
            for found, labels in zip(prediction, target, strict=True)
        ]
        both, union = (sum(each[index] for each in areas) for index in (0, 1))
        return float((both / union).nanmean())

    return way


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (options.batch, options.size, options.size)
    target = torch.randint(0, options.classes, shape)
    prediction = torch.where(torch.rand(shape) < 0.7, target, torch.randint_like(target, 150))
    prediction %= options.classes
    target[:, :20] = 255
    others = {"torchmetrics JaccardIndex": torchmetrics}
    if reference.is_there():
        others["MMSegmentation IoUMetric"] = mmsegmentation
    builders = {**others, "ours": ours}
    ways = {name: build(prediction, target, options.classes) for name, build in builders.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found = {name: way() for name, way in ways.items()}
    for _ in range(options.repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(time.process_time() - start)
    print(f"torch {torch.__version__}, {vars(options)}")
    print("| whose | mIoU | CPU ms | ours is faster by |\n|---|--:|--:|--:|")
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times["ours"], strict=True))
        faster = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        last = faster if name != "ours" else ""
        median = statistics.median(seconds) * 1e3
        print(f"| {name} | {found[name]:.6f} | {median:.1f} | {last} |")


if __name__ == "__main__":
    main()
