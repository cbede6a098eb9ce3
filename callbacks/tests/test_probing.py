"""Decided by what the network does: steps that are not what they are called, weights used twice.

The oracle is a forward hook on the layer, or the explicit network written out by hand.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scale_equalization import NoFusionError, equalize_, find_fusions
from scale_equalization.finding import examine
from torch import nn


class Net(nn.Module):
    """`run(net, a, b)` with maps of 8 and 3 channels; `fuse` takes what it is given."""

    def __init__(self, run, channels: int = 11, **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.fuse = nn.Conv2d(channels, 4, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, 5 * x[:, :8], x[:, 8:])


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 11, 6, 6, generator=generator).double() for _ in range(3)]


def reasons(net: nn.Module, x: torch.Tensor) -> dict[str, str]:
    found = examine(net, lambda: net(x))
    assert found.fusions == ()
    return {refusal.name: refusal.reason for refusal in found.refusals}


BY_NAME_ONLY = {
    "floor division": lambda x: x // 0.5,
    "division with rounding": lambda x: torch.div(x, 0.5, rounding_mode="trunc"),
    "pooling over channels": lambda x: (
        F.avg_pool1d(x.flatten(2).mT, 11).mT.unflatten(2, (6, 6)).repeat(1, 11, 1, 1)
    ),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "data written": lambda x: (x.data.add_(1.0), x)[1],
    "saturating": lambda x: x.clamp(max=100.0),
}


@pytest.mark.parametrize("step", BY_NAME_ONLY)
def test_what_only_looks_proportional_is_refused(step, batches):
    net = Net(lambda net, a, b: net.fuse(BY_NAME_ONLY[step](torch.cat([a, b], 1)))).double()
    assert "fuse" in reasons(net, batches[0])


USES = {
    "transposed": lambda net, y: y + F.conv_transpose2d(y, net.fuse.weight).mean(1, keepdim=True),
    "its norm": lambda net, y: y + net.fuse.weight.norm(),
    "a slice": lambda net, y: y + F.conv2d(y, net.fuse.weight[:, :4]),
    "a penalty": lambda net, y: (y, net.fuse.weight.square().sum())[0],
    "its data": lambda net, y: y + net.fuse.weight.data.mean(),
}


@pytest.mark.parametrize("use", USES)
def test_weights_used_elsewhere_are_refused(use, batches):
    net = Net(lambda net, a, b: USES[use](net, net.fuse(torch.cat([a, b], 1)))).double()
    assert "used" in reasons(net, batches[0])["fuse"]


def seen_by(net: nn.Module, batches) -> torch.Tensor:
    """What the layer is given, over all batches."""
    seen = []
    hook = net.fuse.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            net(batch)
    hook.remove()
    return torch.cat(seen)


SLICES = {
    "split": lambda net, a, b: net.fuse(torch.cat([a * net.ramp, b], 1).split([4, 7], 1)[1]),
    "chunk": lambda net, a, b: net.fuse(torch.cat([a * net.ramp, b], 1)[:, 1:].chunk(2, 1)[1]),
    "crossed": lambda net, a, b: net.fuse(
        torch.cat([torch.cat([a * net.ramp, a], 0), torch.cat([b, b], 0)], 1)[:4]
    ),
}


@pytest.mark.parametrize(("case", "channels"), [("split", 7), ("chunk", 5), ("crossed", 11)])
def test_a_slice_is_measured_by_what_the_layer_takes(case, channels, batches):
    net = Net(SLICES[case], channels).double()
    net.register_buffer("ramp", torch.logspace(0, 3, 8).double().view(8, 1, 1))
    report = equalize_(net, batches, tolerance=0)
    seen = seen_by(net, batches)
    for row in report.rows:
        expected = seen[:, row["start"] : row["stop"]].std(correction=0).item()
        assert row["std"] == pytest.approx(expected, rel=1e-10)
    assert report.rows[-1]["stop"] - report.rows[-1]["start"] == 3


def test_a_global_maximum_before_a_linear_layer_is_found(batches):
    net = Net(lambda net, a, b: net.head(torch.cat([a, b], 1).amax((2, 3))), head=nn.Linear(11, 2))
    (fusion,) = find_fusions(net.double(), batches[0])
    assert (fusion.name, [b.stop for b in fusion.branches]) == ("head", [8, 11])


def test_a_recurrent_cell_is_reported(batches):
    net = Net(
        lambda net, a, b: net.cell(torch.cat([a, b], 1).mean((2, 3))), cell=nn.GRUCell(11, 11)
    )
    with pytest.raises(NoFusionError, match="gru_cell, which is not followed"):
        find_fusions(net.double(), batches[0])


def test_many_branches_are_told_apart_in_several_runs():
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(60, 2, 1)

        def forward(self, x):
            return self.fuse(torch.cat([(i + 1) * x[:, i : i + 1] for i in range(60)], 1))

    (fusion,) = find_fusions(Many(), torch.randn(2, 60, 3, 3))
    assert [branch.stop for branch in fusion.branches] == list(range(1, 61))


def test_blank_maps_do_not_hide_their_branches():
    class Blank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.fuse(F.relu(torch.cat([0 * x, -x.abs()], 1)))

    (fusion,) = find_fusions(Blank(), torch.randn(2, 3, 4, 4))
    assert [branch.stop for branch in fusion.branches] == [3, 6]


def test_a_pass_that_is_never_the_same_is_said(batches):
    generator = torch.Generator().manual_seed(0)

    def run(net, a, b):
        noise = torch.randn(a.shape, generator=generator).double()
        return net.fuse(torch.cat([a, b], 1) + F.pad(noise, (0, 0, 0, 0, 0, 3)))

    assert "fuse" in reasons(Net(run).double(), batches[0])


def cubed_mantissa(x):
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(mantissa**3, exponent)


def few_bits(x):
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 8).round() / 8, exponent)


@pytest.mark.parametrize("step", [cubed_mantissa, few_bits])
def test_proportional_in_powers_of_two_alone_is_refused(step, batches):
    net = Net(lambda net, a, b: net.fuse(step(torch.cat([a, b], 1)))).double()
    with pytest.raises(NoFusionError, match="in powers of two only"):
        find_fusions(net, batches[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_to_a_common_dtype_is_no_obstacle(dtype, batches):
    def rounded(net, a, b):
        x = torch.cat([a, b], 1).to(dtype)
        return net.fuse(nn.functional.avg_pool2d(x, 3, 1, 1).to(a.dtype))

    (fusion,) = find_fusions(Net(rounded).double(), batches[0])
    assert fusion.name == "fuse"
