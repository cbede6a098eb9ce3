"""Metrics on request: what each counts per image, and the figures that follow from the counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from seglab.boundary import count_boundaries
from seglab.calibration import N_BINS, calibration_error, count_confidence
from seglab.metrics import ratios
from seglab.operators.logit_resize import LogitResize, Size
from seglab.operators.upsampled import upsampled_argmax, upsampled_confidence

ExtraMetric = Literal["boundary_iou", "calibration"]
EXTRA_METRICS: tuple[ExtraMetric, ...] = get_args(ExtraMetric)


class Predicted(NamedTuple):
    """What a network said of a batch.

    Attributes:
        ids: Class ids (B, H, W).
        confidence: Softmax of that class (B, H, W); None where nobody asked for it.
    """

    ids: Tensor
    confidence: Tensor | None


def label(scores: Tensor, are_logits: bool, with_confidence: bool) -> Predicted:
    """Class ids of scores (B, K, H, W), which are logits or probabilities."""
    ids = scores.argmax(dim=1)
    confidence = None
    if with_confidence:
        largest = scores.gather(1, ids.unsqueeze(1)).squeeze(1).float()
        confidence = (largest - scores.float().logsumexp(1)).exp() if are_logits else largest
    return Predicted(ids.to(torch.uint8) if scores.shape[1] <= 256 else ids, confidence)


def label_upsampled(
    low: Tensor, size: Size, resize: LogitResize, with_confidence: bool
) -> Predicted:
    """Class ids (B, *size) of logits at their own resolution, which are never seen upsampled."""
    if with_confidence:
        return Predicted(*upsampled_confidence(low, size, resize))
    return Predicted(upsampled_argmax(low, size, resize), None)


def count_extra(kind: str, predicted: Predicted, target: Tensor, num_classes: int) -> Tensor:
    """Counts (B, 3, n) of each image for one metric."""
    if kind == "boundary_iou":
        return count_boundaries(predicted.ids, target, num_classes)
    assert predicted.confidence is not None
    return count_confidence(predicted.confidence, predicted.ids, target, num_classes)


def extra_figures(kind: str, counts: Tensor) -> dict[str, Tensor]:
    """Figures of one metric from counts (..., 3, n): means (...), and per class (..., K)."""
    if kind == "boundary_iou":
        found = ratios(*counts.double().unbind(-2))
        return {"mBoundaryIoU": found["mIoU"], "BoundaryIoU": found["IoU"]}
    return {"ECE": calibration_error(counts)}


class SummedCounts(Metric):
    """Counts of one extra metric over a data set, on its device and over all ranks.

    Args:
        kind: One of `EXTRA_METRICS`.
        num_classes: K.
        **kwargs: Passed to `torchmetrics.Metric`.
    """

    full_state_update = False

    counts: Tensor

    def __init__(self, kind: str, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind
        n_columns = num_classes if kind == "boundary_iou" else N_BINS + 1
        self.add_state("counts", torch.zeros(3, n_columns, dtype=torch.long), "sum")

    def update(self, counts: Tensor) -> None:
        """Add the counts of a batch, (B, 3, n)."""
        self.counts = self.counts + counts.sum(0)

    def compute(self) -> dict[str, Tensor]:
        """The figures of `extra_figures` over all that was counted, float64 on the CPU."""
        return extra_figures(self.kind, self.counts.cpu())


def build_extra(kinds: Iterable[str], num_classes: int) -> nn.ModuleDict:
    """One `SummedCounts` for each metric asked for.

    Raises:
        ValueError: There is none of that name.
    """
    kinds = list(dict.fromkeys(kinds))
    if unknown := [kind for kind in kinds if kind not in EXTRA_METRICS]:
        raise ValueError(
            f"extra_metrics names {unknown[0]!r}: there are {', '.join(EXTRA_METRICS)}."
        )
    return nn.ModuleDict({kind: SummedCounts(kind, num_classes) for kind in kinds})
