"""The configs of the two further decoders: what they say, and what the program makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from seglab.models.heads import BiFPNHead, RSPHead
from seglab.models.necks import FPN

ROOT = Path(__file__).parents[1] / "configs"
CLASSES = {"ade20k": 150, "cityscapes": 19, "camvid": 11}
# width, repeats, parameters of encoder and of pyramid
ESEG = {
    "eseg_lite_s": (64, 3, 2_958_848, 288_358),
    "eseg_lite_m": (88, 4, None, 608_392),
    "eseg_lite_l": (96, 4, None, 732_040),
    "eseg_s": (88, 4, 6_101_024, 608_392),
    "eseg_m": (96, 4, 10_103_336, 732_040),
    "eseg_l": (160, 6, 27_288_112, 2_644_684),
}
FILES = sorted(path for pattern in ("eseg", "rsp") for path in ROOT.glob(f"*/{pattern}_*.yaml"))
SMALL = ("eseg_lite_s", "resnet18")


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def build(path: Path, *more: str) -> Any:
    from seglab.cli import build_experiment

    machine = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    weights = "--model.network.init_args.encoder.init_args.pretrained=false"
    return build_experiment(["--config", str(path), *machine, weights, *more])


def test_every_variant_has_a_config_for_each_data_set() -> None:
    expected = {f"{data}/{name}" for data in ("ade20k", "cityscapes") for name in ESEG}
    expected |= {"ade20k/rsp_r101", "cityscapes/rsp_r101"}
    expected |= {"camvid/eseg_resnet18", "camvid/rsp_resnet18"}
    assert {name_of(path) for path in FILES} == expected


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_header_states_launch_line_and_whose_numbers(path: Path) -> None:
    text = path.read_text()
    launch = f"# python train.py fit --config {path.relative_to(ROOT.parent)}"
    assert text.split("\n")[0].removesuffix(" --data.root /path/to/camvid") == launch
    header = " ".join(line.lstrip("# ") for line in text.partition("\n\n")[0].splitlines())
    assert "ours, not from the paper" in header
    assert ("RSP-style" if "rsp" in path.stem else "ESeg-style") in header
    assert not re.search(r"mIoU of the paper|\d\d\.\d", header)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "camvid"], ids=name_of)
def test_batches_and_validation_add_up(path: Path) -> None:
    text = path.read_text()
    config = yaml.safe_load(text)
    stated = re.search(r"total batch (\d+)", text)
    assert stated is not None
    total = config["trainer"]["devices"] * config["data"]["init_args"]["batch_size"]
    assert total == int(stated[1]) == config["model"]["total_batch"]
    assert config["trainer"]["max_steps"] == 10 * config["trainer"]["val_check_interval"]


@pytest.mark.parametrize(
    "path",
    [p if p.stem.endswith(SMALL) else pytest.param(p, marks=pytest.mark.slow) for p in FILES],
    ids=name_of,
)
def test_network_is_built_as_the_header_says(path: Path) -> None:
    network = build(path).model.network
    head = network.decode_head
    assert network.num_classes == CLASSES[path.parent.name]
    if path.stem not in ESEG:
        assert isinstance(head, RSPHead if path.stem.startswith("rsp") else BiFPNHead)
        assert path.stem.startswith("eseg") or isinstance(head.pyramid, FPN)
        return
    width, repeats, encoder, pyramid = ESEG[path.stem]
    assert (head.bifpn.channels, len(head.bifpn.cells)) == ((width,) * 8, repeats)
    assert sum(p.numel() for p in head.bifpn.parameters()) == pyramid
    found = sum(p.numel() for p in network.encoder.parameters())
    assert encoder in (None, found)
    is_lite = "lite" in path.stem
    assert network.normalize.mean[0, 0, 0, 0] == pytest.approx(127.5 if is_lite else 123.675)
    assert isinstance(head.convs[1], nn.ReLU6 if is_lite else nn.SiLU)


@pytest.mark.parametrize("stem", ["eseg_resnet18", "rsp_resnet18"])
def test_two_steps_train_every_parameter(stem: str) -> None:
    task = build(ROOT / "camvid" / f"{stem}.yaml").model.train()
    task.log = task.log_dict = lambda *args, **kwargs: None
    optimizer = torch.optim.SGD(task.network.parameters(), lr=0.01)
    image = torch.randint(0, 256, (2, 3, 72, 80), dtype=torch.uint8)
    mask = torch.randint(0, 11, (2, 72, 80), dtype=torch.uint8)
    for _ in range(2):
        loss = task.training_step({"image": image, "mask": mask, "name": ["a", "b"]}, 0)
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in task.network.named_parameters() if p.grad is None] == []
        optimizer.step()
        assert torch.isfinite(loss)
