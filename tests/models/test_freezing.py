"""Frozen weights and statistics do not move, bit by bit, and no optimizer holds them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from scale_equalization import ScaleEqualizationCallback
from torch import Tensor

from seglab.data import ScenesDataModule
from seglab.models import Segmenter, SmpNetwork, TimmEncoder
from seglab.models.heads import UPerHead
from seglab.task import SegmentationTask


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def task(**options: Any) -> SegmentationTask:
    torch.manual_seed(0)
    encoder = TimmEncoder("resnet18", **options)
    network = Segmenter(encoder, UPerHead(encoder.channels, 8, channels=8))
    return SegmentationTask(
        network, 8, optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.5)
    )


def train(module: SegmentationTask, root: Path) -> None:
    data = ScenesDataModule(size=32, train_length=12, val_length=2, batch_size=4, num_workers=0)
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[ScaleEqualizationCallback(max_batches=1, verbose=False)],
    ).fit(module, data)


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"trainable": "none"}, ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
        ({"trainable": 1}, ["conv1", "bn1", "layer1", "layer2", "layer3"]),
        ({"trainable": 2}, ["conv1", "bn1", "layer1", "layer2"]),
        ({"trainable": 4}, []),
        ({"trainable": "all"}, []),
        ({"trainable": 2, "gradient_checkpointing": True}, ["conv1", "bn1", "layer1", "layer2"]),
        ({"trainable": 2, "gradient_checkpointing": "pointwise"}, ["conv1", "bn1", "layer2"]),
        ({"trainable": 1, "in_channels": 3, "drop_path": 0.5}, ["conv1", "bn1", "layer3"]),
    ],
)
def test_frozen_stages_do_not_move(
    tmp_path: Path, options: dict[str, Any], frozen: list[str]
) -> None:
    module = task(**options)
    before = state(module.network)
    train(module, tmp_path)
    after = module.network.state_dict()
    for key, value in before.items():
        if key.startswith("encoder.model."):
            part = key.split(".")[2]
            moved = not torch.equal(value, after[key])
            if part in frozen:
                assert not moved, key
            elif frozen and part.startswith("layer") and part < max(frozen):
                continue  # frozen too, not named by this case
            else:
                assert moved, key
        elif key.startswith("decode_head") and value.is_floating_point():
            assert not torch.equal(value, after[key]), key


@pytest.mark.parametrize("trainable", ["none", 1, 2, 3])
def test_optimizer_holds_no_frozen_weights(trainable: Any) -> None:
    module = task(trainable=trainable)
    module.scheduler = None
    held = {
        id(parameter)
        for group in module.configure_optimizers().param_groups
        for parameter in group["params"]
    }
    expected = {id(p) for p in module.network.parameters() if p.requires_grad}
    assert held == expected
    names = [name for name, p in module.network.encoder.named_parameters() if p.requires_grad]
    stages = {name.split(".")[1] for name in names}
    n_stages = 0 if trainable == "none" else trainable
    assert stages == {f"layer{n}" for n in range(5 - n_stages, 5)}


@pytest.mark.parametrize(
    "name", ["convnext_atto", "test_efficientnet", "swin_tiny_patch4_window7_224"]
)
def test_stages_are_found_in_other_families(name: str) -> None:
    encoder = TimmEncoder(name, trainable=2)
    image = torch.rand(1, 3, 64, 64)
    levels = encoder(image)
    assert [level.requires_grad for level in levels] == [False, False, True, True]
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    sum(level.sum() for level in levels[2:]).backward()
    got = {n for n, p in encoder.named_parameters() if p.grad is not None}
    assert got == trained
    assert 0 < len(trained) < len([*encoder.parameters()])


def test_frozen_parts_stay_in_eval_whatever_is_called() -> None:
    network = task(trainable=2).network
    for mode in (True, False, True):
        network.train(mode)
        model = network.encoder.model
        assert [m.training for m in (model.bn1, model.layer2[0].bn1)] == [False, False]
        assert [m.training for m in (model.layer3[0].bn1, model.layer4[1])] == [mode, mode]
    assert not any(m.training for m in task(trainable="none").network.train().encoder.modules())


def test_encoders_of_smp_are_frozen_whole(tmp_path: Path) -> None:
    network = SmpNetwork("Unet", "resnet18", 8, trainable="none")
    before = state(network)
    module = SegmentationTask(network, 8, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    train(module, tmp_path)
    after = module.network.state_dict()
    for key, value in before.items():
        is_encoder = key.startswith("model.encoder.")
        assert torch.equal(value, after[key]) == is_encoder or not value.is_floating_point(), key
    assert not any(m.training for m in network.train().model.encoder.modules())
    with pytest.raises(ValueError, match="all or none"):
        SmpNetwork("Unet", "resnet18", 8, trainable=1)  # type: ignore[arg-type]


def test_a_copy_stays_frozen() -> None:
    network = copy.deepcopy(task(trainable="none").network).train()
    assert not any(m.training for m in network.encoder.modules())


def test_freezing_changes_no_initial_weight() -> None:
    free, frozen = (state(task(trainable=t).network) for t in ("all", 1))
    assert all(torch.equal(free[key], frozen[key]) for key in free)


def test_family_whose_levels_mix_freezes_what_they_share() -> None:
    encoder = TimmEncoder("hrnet_w18_small", trainable=1)
    levels = encoder(torch.rand(2, 3, 64, 64))
    assert [level.requires_grad for level in levels] == [False, False, False, True]


@pytest.mark.parametrize("trainable", [0, 5, -1, True, "last", 1.5])
def test_stages_that_are_not_there_are_refused(trainable: Any) -> None:
    with pytest.raises(ValueError, match="must be all, none or the number of last stages, 1 to 4"):
        TimmEncoder("test_resnet", trainable=trainable)
