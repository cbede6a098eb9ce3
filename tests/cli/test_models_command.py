"""`models` lists what a config can name, and counts what it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import yaml
from torch import nn

from seglab.models import SmpNetwork, TimmEncoder
from seglab.models.catalogue import (
    ENCODER,
    HEAD,
    SMP_NETWORK,
    Entry,
    build_encoder,
    count_costs,
    find_entries,
    list_entries,
)

Run = Callable[..., None]


def macs_of_convolutions(model: nn.Module, side: int) -> int:
    """Multiply-adds of one image, convolution by convolution."""
    counted = []

    def count(layer: nn.Conv2d, inputs: object, output: torch.Tensor) -> None:
        counted.append(layer.weight.numel() * output.shape[-2] * output.shape[-1])

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, side, side))
    return sum(counted)


def test_encoder_is_counted_right(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("models", "resnet26", "--size", "96,96")
    printed = capsys.readouterr().out
    model = timm.create_model("resnet26", num_classes=0)
    macs, parameters = macs_of_convolutions(model, 96), sum(p.numel() for p in model.parameters())
    assert f"{parameters / 1e6:.2f} M parameters, {macs / 1e9:.2f} G multiply-adds" in printed
    assert "channels [256, 512, 1024, 2048] at strides [4, 8, 16, 32]" in printed


def test_costs_of_networks_and_heads() -> None:
    network = SmpNetwork("Unet", "resnet18", 19)
    costs = count_costs(Entry("Unet", SMP_NETWORK), (64, 64), "resnet18")
    assert costs.parameters == sum(p.numel() for p in network.parameters())
    assert costs.macs == macs_of_convolutions(network, 64)
    head = count_costs(Entry("FCNHead", HEAD), (64, 64), "test_resnet")
    encoder = count_costs(Entry("test_resnet", ENCODER), (64, 64), "")
    assert head.parameters > encoder.parameters
    assert head.macs > encoder.macs


def test_what_is_printed_can_be_written(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("models", "test_convnext", "--size", "160,160")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "class_path" in line]
    section = yaml.safe_load(line)
    assert section["class_path"] == "seglab.models.TimmEncoder"
    TimmEncoder(**section["init_args"])


def test_list_names_every_kind(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("models")
    lines = capsys.readouterr().out.splitlines()
    assert f"encoder: {len(timm.list_models())}" in lines
    assert any("UPerHead" in line for line in lines)
    assert any("UnetPlusPlus" in line for line in lines)
    assert len(lines) < 60
    assert max(map(len, lines)) <= 100


def test_patterns_list_names(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("models", "swin_*")
    printed = capsys.readouterr().out
    assert all(name in printed for name in timm.list_models("swin_*"))
    assert "multiply-adds an image" not in printed


def test_names_win_over_patterns_and_parts() -> None:
    entries = list_entries()
    assert {e.name for e in find_entries("resnet18.a1_in1k", entries)} == {"resnet18"}
    assert {e.name for e in find_entries("UPERH*", entries)} == {"UPerHead"}
    assert {e.kind for e in find_entries("upern", entries)} == {SMP_NETWORK}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet1888"], "nothing is called 'resnet1888'; did you mean resnet18"),
        (["uperhed"], "did you mean UPerHead"),
        (["resnet18", "--size", "big"], "is not HEIGHT,WIDTH, such as 512,512"),
        (["resnet18", "--size", "0,9"], "both must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(
    args: list[str], message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("models", *args)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_what_cannot_run_says_why(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("models", "Unet", "--size", "64,64", "--encoder", "resnet1888")
    assert "cannot be used: " in capsys.readouterr().out


@pytest.mark.slow
def test_every_family_of_timm_has_an_encoder() -> None:
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            name = min(names, key=lambda name: ("test" not in name, len(name)))
            assert build_encoder(name).channels
