"""Every block of docs/networks.md goes into a config as it stands, and trains a step."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from seglab.cli import build_experiment

PAGE = (Path(__file__).parents[1] / "docs/networks.md").read_text()
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


def merge(base: Any, block: Any) -> Any:
    """Put a block over a config; another class brings its own arguments."""
    if not isinstance(base, dict) or not isinstance(block, dict):
        return block
    if block.get("class_path", base.get("class_path")) != base.get("class_path"):
        return block
    return base | {key: merge(base.get(key), value) for key, value in block.items()}


def test_the_page_has_a_block_for_every_wish() -> None:
    assert len(BLOCKS) == 12
    words = ("in_channels", "trainable", "EncoderRate", "LayerDecay", "class_weight", "DiceLoss")
    more = ("FocalLoss", "LovaszLoss", "TverskyLoss", "WeightedSum", "SmpNetwork")
    assert all(any(word in block for block in BLOCKS) for word in words + more)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_builds_and_trains_a_step(block: str, tiny: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(tiny.read_text())
    wanted = yaml.safe_load(block)
    bands = wanted.get("data", {}).get("init_args", {}).get("channels", 3)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(merge(copy.deepcopy(config), wanted)))
    arguments = ["--config", str(tmp_path / "a.yaml"), "--trainer.logger=false"]
    task = build_experiment(arguments).model
    task.log_dict = lambda *args, **options: None
    task.scheduler = None  # it asks the trainer for the length of the run
    optimizer = task.configure_optimizers()
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, bands, 64, 64), generator=generator, dtype=torch.uint8)
    mask = torch.randint(0, 8, (2, 64, 64), generator=generator, dtype=torch.uint8)
    mask[:, :5] = 255
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    loss = task.training_step({"image": image, "mask": mask, "name": ["a", "b"]}, 0)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    moved = {name for name, p in task.named_parameters() if not torch.equal(before[name], p)}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in task.named_parameters() if id(p) in held}
    assert moved <= names
    assert any("conv_seg" in name or "segmentation_head" in name for name in moved)
