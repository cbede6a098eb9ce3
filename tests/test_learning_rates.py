"""Rates of fine-tuning, layer by layer, against rates written down by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from seglab.learning_rates import EncoderRate, LayerDecay
from seglab.models import Segmenter, SmpNetwork, TimmEncoder
from seglab.models.heads import FCNHead
from seglab.optim import build_optimizer


def network(name: str = "resnet18", **options: Any) -> Segmenter:
    encoder = TimmEncoder(name, **options)
    return Segmenter(encoder, FCNHead(encoder.channels, 3, channels=8))


def rates(module: nn.Module, rules: Any) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter that the optimizer holds, by name."""
    optimizer = build_optimizer(
        module, lambda groups: torch.optim.AdamW(groups, lr=1.0, weight_decay=0.5), rules
    )
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_resnet_layers_learn_as_written_down() -> None:
    module = network()
    found = rates(module, LayerDecay(0.5))
    layer = {"conv1": 0, "bn1": 0}  # stem, then two blocks in each of four stages
    layer |= {f"layer{s}.{b}": 1 + 2 * (s - 1) + b for s in range(1, 5) for b in range(2)}
    assert len(found) == len([*module.parameters()])
    for name, parameter in module.named_parameters():
        number = 9
        if name.startswith("encoder.model."):
            bare = name.removeprefix("encoder.model.")
            (number,) = (n for part, n in layer.items() if bare.startswith(part + "."))
        assert found[name] == (0.5 ** (9 - number), 0.0 if parameter.ndim == 1 else 0.5), name


def test_names_that_timm_spares_do_not_decay() -> None:
    found = rates(network("swin_tiny_patch4_window7_224"), LayerDecay(0.9))
    tables = [name for name in found if "relative_position_bias_table" in name]
    assert tables
    assert all(found[name][1] == 0.0 for name in tables)
    assert found["encoder.norm3.weight"][0] == found["decode_head.conv_seg.weight"][0] == 1.0


def test_encoder_learns_at_its_own_rate() -> None:
    for module in (network(), SmpNetwork("Unet", "resnet18", 3)):
        prefix = "encoder." if isinstance(module, Segmenter) else "model.encoder."
        found = rates(module, EncoderRate(0.1, no_decay=["bn"]))
        assert found.keys() == {name for name, _ in module.named_parameters()}
        for name, (rate, decay) in found.items():
            assert rate == (0.1 if name.startswith(prefix) else 1.0)
            assert decay == (0.0 if "bn" in name else 0.5)


@pytest.mark.parametrize("rules", [EncoderRate(0.1), LayerDecay(0.5)])
def test_frozen_weights_are_in_no_group(rules: Any) -> None:
    module = network(trainable=1)
    assert rates(module, rules).keys() == {
        n for n, p in module.named_parameters() if p.requires_grad
    }


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="EncoderRate is for networks with an encoder"):
        EncoderRate()(nn.Linear(2, 2), 1.0, 0.0)
    with pytest.raises(ValueError, match="no parameter's name contains 'nrom'"):
        EncoderRate(no_decay=["nrom"])(network(), 1.0, 0.0)
    with pytest.raises(ValueError, match="whose layers timm numbers"):
        LayerDecay()(SmpNetwork("Unet", "resnet18", 3), 1.0, 0.0)
    with pytest.raises(ValueError, match="a factor in"):
        LayerDecay(1.5)
