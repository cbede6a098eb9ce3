"""Products, patches and maps that are not followed are reported where they take a concatenation."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from scale_equalization import find_fusions
from scale_equalization.finding import examine
from torch import nn


class Net(nn.Module):
    """`run(net, a, b)` with two maps of 4 channels; `fuse` takes all 8."""

    def __init__(self, run, fuse=None, **modules) -> None:
        super().__init__()
        self.run = run
        self.fuse = nn.Conv2d(8, 4, 1) if fuse is None else fuse
        self.weight = nn.Parameter(torch.randn(8, 8))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, a, b):
        return self.run(self, a, b)


@pytest.fixture
def maps():
    return torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)


def cat(a, b, dim=1):
    return torch.cat([a, b], dim)


def refusals(net, maps, **options) -> dict[str, str]:
    found = examine(net, lambda: net(*maps), **options)
    assert found.fusions == ()
    return {refusal.name: refusal.reason for refusal in found.refusals}


OPAQUE = {
    "matmul": lambda net, x: x.permute(0, 2, 3, 1) @ net.weight.t(),
    "matmul from the left": lambda net, x: torch.matmul(net.weight, x.flatten(2)),
    "einsum": lambda net, x: torch.einsum("bchw,oc->bohw", x, net.weight),
    "addmm": lambda net, x: torch.addmm(net.weight[0], x.mean((2, 3)), net.weight),
    "bilinear": lambda net, x: net.bilinear(x.mean((2, 3)), x.mean((2, 3))),
    "lstm": lambda net, x: net.lstm(x.flatten(2).transpose(1, 2))[0],
    "multi_head_attention_forward": lambda net, x: net.attend(*[x.flatten(2).mT] * 3)[0],
}


@pytest.mark.parametrize("product", OPAQUE)
def test_weights_applied_in_ways_not_followed_are_reported(product, maps):
    modules = {
        "bilinear": nn.Bilinear(8, 8, 3),
        "lstm": nn.LSTM(8, 4, batch_first=True),
        "attend": nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True),
    }
    net = Net(lambda net, a, b: OPAQUE[product](net, cat(a, b)), **modules)
    (reason,) = refusals(net, maps).values()
    assert f"go into {product.split(' ')[0]}, which is not followed" in reason


def test_quantized_layers_are_reported(maps):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantized layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = Net(lambda net, a, b: net.fuse(cat(a, b).mean((2, 3))), nn.Linear(8, 4))
        net = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    assert "linear_dynamic, which is not followed" in refusals(net, maps)["fuse"]


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("concatenates_inside", [False, True])
def test_torchscript_is_reported(maps, concatenates_inside):
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(8, 4, 1)

        def forward(self, a, b):
            return self.layer(torch.cat([a, b], 1))

    if concatenates_inside:
        net = Net(lambda net, a, b: net.fuse(a, b), torch.jit.script(Inside()))
    else:
        net = Net(lambda net, a, b: net.fuse(cat(a, b)), torch.jit.script(nn.Conv2d(8, 4, 1)))
    assert "TorchScript" in refusals(net, maps)["fuse"]


@pytest.mark.parametrize("how", ["assigned", "copied", "by index", "scattered"])
def test_maps_filled_slice_by_slice_are_fusions(maps, how):
    def run(net, a, b):
        both = a.new_empty(2, 8, 8, 8)
        if how == "assigned":
            both[:, :4], both[:, 4:] = a, b
        elif how == "by index":
            both.index_copy_(1, torch.arange(4), a).index_copy_(1, torch.arange(4, 8), b)
        elif how == "scattered":
            both = both.slice_scatter(a, 1, 0, 4).slice_scatter(b, 1, 4, 8)
        else:
            both[:, :4].copy_(a)
            both.narrow(1, 4, 4).copy_(b)
        return net.fuse(F.relu(both))

    (fusion,) = find_fusions(Net(run), *maps)
    assert [(branch.start, branch.stop) for branch in fusion.branches] == [(0, 4), (4, 8)]


def test_rereading_the_memory_and_back_is_looked_through(maps):
    net = Net(lambda net, a, b: net.fuse(cat(a, b).view(torch.int32).view(torch.float32)))
    assert [branch.stop for branch in find_fusions(net, *maps)[0].branches] == [4, 8]


def test_patches_as_channels_are_branches(maps):
    net = Net(lambda net, a, b: net.fuse(F.unfold(cat(a, b), 3).mT), nn.Linear(72, 4))
    (fusion,) = find_fusions(net, *maps)
    assert [(branch.start, branch.stop) for branch in fusion.branches] == [(0, 36), (36, 72)]


def test_operations_of_other_libraries_are_reported(maps):
    @torch.library.custom_op("zoo::mix", mutates_args=())
    def mix(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bchw,oc->bohw", x, weight)

    net = Net(lambda net, a, b: mix(cat(a, b), net.weight[:3]))
    assert refusals(net, maps) == {
        "the model": "its branches go into mix, which is not followed: only convolutions and "
        "F.linear are"
    }
