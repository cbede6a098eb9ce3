"""A reparametrized network's state dict: what is written into it, and what is called with it."""

from __future__ import annotations

import copy

import pytest
import torch
from scale_equalization import ScaleEqualizationError, bake_, equalize_
from torch import nn
from torch.func import functional_call
from toy_network import Toy, data, plain

MODES = ["fold", "reparametrize"]


def equalized(mode: str) -> Toy:
    net = Toy(plain)
    equalize_(net, data(), mode=mode)
    return net


def average(copy_: nn.Module, net: nn.Module, way: str) -> None:
    """As timm's ModelEmaV2 and V3 and mmengine do it."""
    values, new = list(copy_.state_dict().values()), list(net.state_dict().values())
    if way == "foreach":
        torch._foreach_lerp_(values, new, 0.5)
    for old, value in zip(values, new, strict=True) if way != "foreach" else ():
        if way == "copy":
            old.copy_(0.5 * old + 0.5 * value)
        elif way == "data":
            old.data.lerp_(value.data, 0.5)
        else:
            old.mul_(0.5).add_(value, alpha=0.5)


@pytest.mark.parametrize("then", ["state_dict", "forward", "deepcopy", "bake", "double"])
@pytest.mark.parametrize("way", ["foreach", "copy", "in place", "data"])
def test_averages_written_into_the_state_dict_are_kept(way, then):
    net = equalized("reparametrize")
    kept, expected = copy.deepcopy(net), bake_(copy.deepcopy(net))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    for _ in range(3):
        average(kept, net, way)
        average(expected, bake_(copy.deepcopy(net)), way)
    if then == "deepcopy":
        kept = copy.deepcopy(kept)
    elif then == "bake":
        bake_(kept)
    elif then == "double":
        kept.double()
    if then == "state_dict":
        weight = kept.state_dict()["fuse1.weight"]
        assert torch.allclose(weight, expected.fuse1.weight, rtol=1e-12)
    assert torch.allclose(kept(data()[0]), expected(data()[0]), rtol=1e-12)


def test_a_state_dict_written_into_late_is_refused():
    net = equalized("reparametrize")
    state = net.state_dict()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    state["fuse1.weight"].zero_()
    with pytest.raises(ScaleEqualizationError, match="new state_dict"):
        net(data()[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", ["state dict", "its clones", "parameters", "their clones"])
def test_functional_call_computes_what_the_network_does(mode, values):
    net = equalized(mode)
    source = net.state_dict() if "clones" in values or "state" in values else None
    if "parameters" in values or "their" in values:
        source = dict(net.named_parameters())
    if "clones" in values:
        source = {name: value.detach().clone() for name, value in source.items()}
    assert torch.equal(functional_call(net, source, (data()[0],)), net(data()[0]))


def test_gradients_by_functional_call_are_those_of_the_network():
    net = equalized("reparametrize")
    net.state_dict()  # a checkpoint was written meanwhile
    values = {name: value.detach().clone() for name, value in net.named_parameters()}

    def loss(parameters):
        return functional_call(net, parameters, (data()[0],)).square().mean()

    gradients = torch.func.grad(loss)(values)
    net(data()[0]).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-12)


def test_saving_while_training_changes_nothing():
    nets = [equalized("reparametrize") for _ in range(2)]
    for index, net in enumerate(nets):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for batch in data():
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            if index:
                net.state_dict()
            optimizer.step()
    first, second = (net.state_dict() for net in nets)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_state_dicts_are_views_of_one_weight():
    net = equalized("reparametrize")
    first, second = net.state_dict(), net.state_dict()
    first["fuse1.weight"].mul_(2)
    assert torch.equal(second["fuse1.weight"], first["fuse1.weight"])
    assert torch.equal(net.state_dict()["fuse1.weight"], first["fuse1.weight"])
