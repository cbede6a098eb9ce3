"""What a run says of classes that it has not found, and how it names classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from seglab.metrics import SegmentationMetrics
from seglab.reporting.results import _markdown, _remark


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


def test_class_name_does_not_end_its_cell() -> None:
    row = {"name": "bus|tram", "IoU": 0.5, "Acc": 0.5, "Dice": 0.5, "share_of_labels": 1.0}
    means = dict.fromkeys(("mIoU", "mAcc", "mDice", "aAcc"), 0.5)
    text = _markdown({"split": "val", "step": 3, "classes": [row], **means})
    assert "| bus\\|tram | 50.00 | 50.00 | 50.00 | 100.00 |" in text
