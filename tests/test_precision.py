"""Every head trains, validates, tests and predicts in every precision."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from seglab.losses import CrossEntropy
from seglab.models import FusionConv2d, Segmenter, TimmEncoder
from seglab.models.heads import (
    ASPPHead,
    BiFPNHead,
    FCNHead,
    PSPHead,
    RSPHead,
    SepASPPHead,
    UPerHead,
)
from seglab.optim import WarmupPolyLR
from seglab.task import SegmentationTask

K = 3


def make_task(head: Any, loss: CrossEntropy) -> SegmentationTask:
    torch.manual_seed(0)
    auxiliary = partial(FCNHead, channels=8, dropout=0.0, num_convs=1)
    head = partial(head, channels=8, dropout=0.0)
    network = Segmenter(TimmEncoder("test_resnet"), head, auxiliary, K)
    for module in network.modules():
        if isinstance(module, FusionConv2d) and module.groups == 1:
            module.force = "fused"
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    return SegmentationTask(network, K, loss, optimizer, WarmupPolyLR)


def batches() -> dict[str, DataLoader[Any]]:
    generator = torch.Generator().manual_seed(0)
    items = [
        {
            "image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator),
            "mask": torch.randint(0, K, (50, 70), generator=generator).to(torch.uint8),
            "name": str(index),
        }
        for index in range(4)
    ]
    train = [item | {"mask": item["mask"].new_zeros(64, 64)} for item in items]
    return {"train": DataLoader(train, batch_size=2), "val": DataLoader(items, batch_size=2)}


def go_through(task: SegmentationTask, path: Path, precision: Any, device: str) -> Any:
    """Everything a user does; returns what `test` measured and the predictions."""
    quiet = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=path, accelerator=device, devices=1, precision=precision,
                      enable_progress_bar=False, max_epochs=1, **quiet)  # fmt: skip
    loaders = batches()
    trainer.fit(task, loaders["train"], loaders["val"])
    trainer.validate(task, loaders["val"], verbose=False)
    (results,) = trainer.test(task, loaders["val"], verbose=False)
    return results, trainer.predict(task, loaders["val"])


LOSSES = {"": CrossEntropy(), "ohem": CrossEntropy(ohem_thresh=0.7, ohem_min_kept=9)}
HEADS = [UPerHead, PSPHead, ASPPHead, SepASPPHead, FCNHead, BiFPNHead, RSPHead]
DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize(
    ("head", "loss"),
    [pytest.param(UPerHead, "", id="UPerHead"), pytest.param(UPerHead, "ohem", id="ohem")]
    + [pytest.param(h, "", id=h.__name__, marks=pytest.mark.slow) for h in HEADS[1:]],
)
def test_runs_from_fit_to_predict(
    head: Any, loss: str, precision: str, device: str, tmp_path: Path
) -> None:
    task = make_task(head, LOSSES[loss])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results, predictions = go_through(task, tmp_path, precision, device)
    replaced = [w for w in said if "fp16 is not supported on CPU" in str(w.message)]
    assert bool(replaced) == (precision == "16-mixed" and device == "cpu")
    assert torch.tensor(results["test/loss"]).isfinite()
    assert all(p.isfinite().all() for p in task.parameters())
    assert [x.shape for x in predictions] == [(2, 50, 70)] * 2
    assert all(int(x.max()) < K for x in predictions)
