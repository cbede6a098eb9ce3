"""Backbones from local files: right ones load whole, wrong ones are named key by key."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from seglab.models import TimmEncoder

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> State:
    torch.manual_seed(7)
    state: State = timm.create_model("resnet18").state_dict()
    return state


def without_classifier(weights: State) -> State:
    return {key: value for key, value in weights.items() if not key.startswith("fc.")}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_whole_backbone_loads(suffix: str, weights: State, tmp_path: Path) -> None:
    path = tmp_path / f"backbone.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    loaded = TimmEncoder("resnet18", checkpoint_path=path).model.state_dict()
    assert loaded.keys() == without_classifier(weights).keys()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())


def test_classifier_may_be_absent(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "headless.pth"
    torch.save(without_classifier(weights), path)
    encoder = TimmEncoder("resnet18", checkpoint_path=path)
    assert torch.equal(encoder.model.conv1.weight, weights["conv1.weight"])


def test_original_swin_names_are_converted(tmp_path: Path) -> None:
    torch.manual_seed(3)
    name = "swin_tiny_patch4_window7_224"
    source = timm.create_model(name)
    path = tmp_path / "swin.pth"
    # Microsoft's file stores a stage's downsampling with the stage before.
    state = {
        key.replace(f"layers.{i}.downsample", f"layers.{i - 1}.downsample"): value
        for key, value in source.state_dict().items()
        for i in [int(key.split(".")[1]) if key.startswith("layers.") else 0]
    }
    torch.save({"model": {k.replace("head.fc", "head"): v for k, v in state.items()}}, path)
    encoder = TimmEncoder(name, checkpoint_path=path)
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_norm_before_the_classifier_becomes_the_last_output_norm(tmp_path: Path) -> None:
    source = timm.create_model("convnext_atto")
    torch.nn.init.normal_(source.head.norm.weight)
    path = tmp_path / "convnext.pth"
    torch.save(source.state_dict(), path)
    encoder = TimmEncoder("convnext_atto", checkpoint_path=path)
    assert torch.equal(encoder.norm3.weight, source.head.norm.weight)
    assert torch.equal(encoder.norm2.weight, torch.ones(160))


def test_weights_by_tag_are_those_timm_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    create, loaded = timm.create_model, {}

    def create_offline(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        model: torch.nn.Module = create(name, **options)
        if pretrained:
            loaded.update(model.state_dict())
        return model

    monkeypatch.setattr(timm, "create_model", create_offline)
    encoder = TimmEncoder("resnet18.a1_in1k", pretrained=True)
    assert loaded
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, loaded[key]), key


def test_weights_that_cannot_be_fetched_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def create_offline(name: str, pretrained: bool = False, **options: object) -> torch.nn.Module:
        if pretrained:
            raise OSError("no route to host")
        model: torch.nn.Module = create(name, **options)
        return model

    monkeypatch.setattr(timm, "create_model", create_offline)
    with pytest.raises(ValueError, match=r"resnet18 cannot be had \(no route.*checkpoint_path"):
        TimmEncoder("resnet18", pretrained=True)


def test_what_does_not_match_is_listed(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "wrong.pth"
    wrong = dict(weights)
    del wrong["layer1.0.conv1.weight"]
    wrong["layer9.weight"] = torch.zeros(1)
    wrong["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(wrong, path)
    with pytest.raises(ValueError, match=r"wrong\.pth does not fit") as caught:
        TimmEncoder("resnet18", checkpoint_path=path)
    message = str(caught.value)
    assert "1 absent: model.layer1.0.conv1.weight" in message
    assert "1 unknown: model.layer9.weight" in message
    assert "model.conv1.weight (64, 3, 3, 3) in the file, (64, 3, 7, 7) in the network" in message


def test_weights_of_another_architecture_are_refused(weights: State, tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"resnet18\.pth does not fit: .*absent: .* and \d+ more"):
        TimmEncoder("resnet34", checkpoint_path=path)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights at .*nowhere\.pth"):
        TimmEncoder("resnet18", checkpoint_path=tmp_path / "nowhere.pth")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pth is not a readable checkpoint"):
        TimmEncoder("resnet18", checkpoint_path=broken)
