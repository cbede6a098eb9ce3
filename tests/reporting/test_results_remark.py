"""What a run says of classes that it has not found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from seglab.metrics import SegmentationMetrics
from seglab.reporting.results import _remark


@pytest.mark.parametrize(
    ("prediction", "said"), [([0, 0, 0, 2], "of car:"), ([0, 1, 0, 0], ""), ([2, 2, 2, 2], "rest")]
)
def test_classes_of_which_nothing_was_found_are_named(prediction: list[int], said: str) -> None:
    metrics = SegmentationMetrics(3)
    metrics.update(torch.tensor([[prediction]]), torch.tensor([[[0, 1, 0, 255]]]))
    losses = SimpleNamespace(update_called=False)
    names = ["rest", "car", "absent"]
    task = SimpleNamespace(metrics={"val": metrics}, losses={"val": losses}, class_names=names)
    remark = _remark(task, "val")
    assert said in remark
    assert bool(remark) == bool(said)
    assert "absent" not in remark
