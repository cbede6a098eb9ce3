"""Weights of smp's own networks go into `SmpNetwork`, with the same or with other classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch

from seglab.checkpoints import load_weights
from seglab.models import SmpNetwork


@pytest.mark.parametrize("nested", [False, True])
def test_weights_saved_by_smp_are_taken(tmp_path: Path, nested: bool) -> None:
    torch.manual_seed(0)
    theirs = smp.create_model("Unet", "resnet18", encoder_weights=None, classes=4).eval()
    state = theirs.state_dict()
    torch.save({"state_dict": state} if nested else state, tmp_path / "w.pth")
    ours = SmpNetwork("Unet", "resnet18", 4).eval()
    load_weights(ours, tmp_path / "w.pth")
    image = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        assert torch.equal(ours(image), theirs(ours.normalize(image)))


def test_other_classes_take_all_but_the_head(tmp_path: Path) -> None:
    theirs = smp.create_model("Unet", "resnet18", encoder_weights=None, classes=4)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours = SmpNetwork("Unet", "resnet18", 6)
    fresh = {key: value.clone() for key, value in ours.state_dict().items()}
    load_weights(ours, tmp_path / "w.pth")
    for key, value in ours.state_dict().items():
        is_head = key.startswith("model.segmentation_head")
        expected = fresh[key] if is_head else theirs.state_dict()[key.removeprefix("model.")]
        assert torch.equal(value, expected), key


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    theirs = smp.create_model("Linknet", "resnet18", encoder_weights=None, classes=4)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is of another network"):
        load_weights(SmpNetwork("Unet", "resnet18", 4), tmp_path / "w.pth")
