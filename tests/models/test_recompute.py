"""Blocks computed again in the backward pass: less memory, not one number changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from side_by_side import peak_bytes
from torch import Tensor, nn

from seglab.models import TimmEncoder
from seglab.models.recompute import recompute_blocks_

CONVOLUTIONAL = {"resnet18": 8, "resnet26t": 8, "resnetv2_50": 16, "regnety_002": 13,
                 "mobilenetv3_small_050": 10, "densenet121": 58, "convnext_atto": 12}  # fmt: skip
FAMILIES = {**CONVOLUTIONAL, "twins_svt_small": 18, "mvitv2_tiny": 10,
            "swin_tiny_patch4_window7_224": 12}  # fmt: skip
"""Encoders and their repeated blocks."""


def make_encoder(name: str, checkpointing: Any) -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder(name, gradient_checkpointing=checkpointing)


def n_recomputed(encoder: nn.Module) -> int:
    return sum("forward" in vars(module) for module in encoder.modules())


def train(encoder: nn.Module, size: int = 64) -> dict[str, Tensor]:
    """Gradients, and buffers after one step."""
    torch.manual_seed(1)
    image = torch.randn(2, 3, size, size)
    torch.stack([x.square().mean() for x in encoder(image)]).sum().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in encoder.named_parameters()}
    return gradients | {name: x.clone() for name, x in encoder.named_buffers()}


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [(name, True) for name in FAMILIES] + [(name, "pointwise") for name in CONVOLUTIONAL],
)
def test_gradients_and_running_statistics_are_the_same(name: str, checkpointing: Any) -> None:
    expected = train(make_encoder(name, False))
    encoder = make_encoder(name, checkpointing)
    found = train(encoder)
    assert n_recomputed(encoder) == FAMILIES[name]
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)


def test_random_depth_draws_the_same_paths() -> None:
    found = []
    for checkpointing in (False, True, "pointwise"):
        torch.manual_seed(0)
        encoder = TimmEncoder("convnext_atto", drop_path=0.5, gradient_checkpointing=checkpointing)
        found.append(train(encoder))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[2][key], value, rtol=1e-5, atol=1e-6)


def test_peak_memory_falls() -> None:
    """Of a bottleneck's 12 maps of `width` channels, 2 are not kept by "pointwise", 8 by True."""
    plain, pointwise, whole = (
        peak_bytes(partial(train, make_encoder("resnet50", checkpointing), size=256))
        for checkpointing in (False, "pointwise", True)
    )
    gradients = 94e6  # bytes
    assert pointwise - gradients < 0.87 * (plain - gradients)
    assert whole < pointwise


def test_copies_recompute_their_own_blocks() -> None:
    encoder = make_encoder("resnet18", "pointwise")
    expected = train(copy.deepcopy(encoder))
    for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        found = train(twin)
        assert n_recomputed(twin) == FAMILIES["resnet18"]
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("checkpointing", [True, "pointwise"])
def test_graph_may_be_gone_through_twice(checkpointing: Any) -> None:
    encoder = make_encoder("resnet18", checkpointing)
    loss = encoder(torch.randn(2, 3, 64, 64))[-1].square().mean()
    loss.backward(retain_graph=checkpointing is True)
    first = [p.grad.clone() for p in encoder.parameters()]
    if checkpointing is True:
        loss.backward()
        for value, once in zip(encoder.parameters(), first, strict=True):
            torch.testing.assert_close(value.grad, 2 * once)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("davit_tiny", {"SpatialBlock", "ChannelBlock"}),  # not the MLP that both contain
        ("maxvit_rmlp_pico_rw_256", {"MaxxVitBlock", "PartitionAttentionCl"}),
        ("regnety_002", {"Bottleneck"}),
        ("vit_tiny_patch16_224", {"Block"}),
    ],
)
def test_blocks_are_whole_and_hold_nearly_all_weights(name: str, kinds: set[str]) -> None:
    model = timm.create_model(name)
    recompute_blocks_(model, keep_convolutions=False)
    blocks = [module for module in model.modules() if "forward" in vars(module)]
    assert {type(module).__name__ for module in blocks} == kinds
    n_inside = sum(p.numel() for module in blocks for p in module.parameters())
    assert n_inside > 0.85 * sum(p.numel() for p in model.parameters())


def test_evaluation_recomputes_nothing() -> None:
    encoder = make_encoder("resnet18", True).eval()
    plain = make_encoder("resnet18", False).eval()
    image = torch.randn(1, 3, 64, 64)
    for found, expected in zip(encoder(image), plain(image), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_has_no_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no repeated blocks to recompute"):
        recompute_blocks_(nn.Linear(2, 2), keep_convolutions=False)
    with pytest.raises(ValueError, match="Transformer have weights in Linear"):
        TimmEncoder("vit_tiny_patch16_224", gradient_checkpointing="pointwise")
    with pytest.raises(ValueError, match="must be true, false or 'pointwise', got 'cheap'"):
        TimmEncoder("resnet18", gradient_checkpointing="cheap")


class Block(nn.Module):
    def __init__(self, norm: nn.Module, spectral: bool) -> None:
        super().__init__()
        first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        wrap = nn.utils.parametrizations.spectral_norm if spectral else lambda layer: layer
        self.layers = nn.Sequential(wrap(first), norm, nn.Sigmoid(), wrap(second))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def blocks(spectral: bool, keep_convolutions: bool | None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(nn.BatchNorm2d(4), spectral) for _ in range(2))).double()
    if keep_convolutions is not None:
        recompute_blocks_(model, keep_convolutions)
        assert n_recomputed(model) == 2
    return model


def gradients_after(model: nn.Module, between: Callable[[nn.Module], object]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=generator)
    loss = model(image).square().sum()
    between(model)
    loss.backward()
    return [p.grad for p in model.parameters()] + list(model.buffers())


def another_pass(model: nn.Module) -> None:
    with torch.no_grad():
        model(torch.ones(1, 4, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize("keep_convolutions", [True, False])
@pytest.mark.parametrize("between", [lambda model: None, another_pass, nn.Module.eval])
def test_power_iterations_of_spectral_norm_are_not_repeated(
    between: Callable[[nn.Module], object], keep_convolutions: bool
) -> None:
    expected = gradients_after(blocks(True, None), between)
    found = gradients_after(blocks(True, keep_convolutions), between)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keep_convolutions", [True, False])
def test_frozen_statistics_may_move_before_the_backward_pass(keep_convolutions: bool) -> None:
    def thaw(model: nn.Module) -> None:
        model.train()
        another_pass(model)

    # Plain batch normalization reads its statistics at backward time, without a word if they have
    # moved: the gradient to compare with is that of a network left in peace.
    found = []
    cases = ((blocks(False, None), lambda _: None), (blocks(False, keep_convolutions), thaw))
    for model, between in cases:
        another_pass(model)
        for module in model.modules():
            module.train(not isinstance(module, nn.BatchNorm2d))
        n_parameters = len(list(model.parameters()))
        found.append(gradients_after(model, between)[:n_parameters])
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_weights_changed_before_the_backward_pass_are_an_error() -> None:
    def step(model: nn.Module) -> None:
        with torch.no_grad():
            model[0].layers[0].weight.mul_(2)

    with pytest.raises(RuntimeError, match="weight of Block was changed in place"):
        gradients_after(blocks(False, False), step)
