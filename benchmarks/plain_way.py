"""Our task, the plain way or not, to be stepped by hand. Imported, not run."""

from __future__ import annotations

from typing import Any, Literal

from seglab.losses import CrossEntropy
from seglab.models import FusionConv2d, Segmenter
from seglab.task import SegmentationTask


class FullSizeLoss(CrossEntropy):
    """Cross-entropy of logits at the label's size, which the task then makes."""

    on_upsampled = None  # type: ignore[assignment]


def bare_task(
    network: Segmenter, force: Literal["plain", "fused"] | None, optimizer: Any = None
) -> SegmentationTask:
    """A task in training that needs no trainer.

    Args:
        network: whose fusion layers are set to `force`.
        force: "plain" resizes, concatenates, convolves and makes full-size logits.
        optimizer: as for `SegmentationTask`.
    """
    for module in network.modules():
        if isinstance(module, FusionConv2d):
            module.force = force
    loss = FullSizeLoss() if force == "plain" else CrossEntropy()
    task = SegmentationTask(network, network.num_classes, loss, optimizer).train()
    task.log = task.log_dict = lambda *_, **__: None  # type: ignore[assignment, method-assign]
    return task
