"""Wrappers, compilers, exporters and checkpointing do not hide a fusion."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from scale_equalization import (
    bake_,
    equalize_,
    find_fusions,
    measure_scales,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.fuse = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4))

    def levels(self, x: Tensor) -> Tensor:
        fine = self.encoder(x)
        return torch.cat([fine, F.interpolate(self.pool(fine), x.shape[2:])], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(self.levels(x))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_distributed_wrapper_is_looked_through(net, x, process_group):
    expected = find_fusions(net, x)
    wrapped = nn.parallel.DistributedDataParallel(net)
    assert find_fusions(wrapped, x) == expected
    assert find_fusions(nn.DataParallel(net), x) == expected
    equalize_(
        wrapped, [x], forward=lambda _, x: wrapped(x)
    )  # the batches may go through the wrapper


@pytest.mark.parametrize("how", ["model", "in place", "submodule", "function"])
def test_compiled_networks_are_looked_through(net, x, how):
    expected = find_fusions(net, x)
    replica = copy.deepcopy(net)
    if how == "model":
        compiled = torch.compile(replica, backend="eager")
    elif how == "in place":
        compiled = replica
        replica.compile(backend="eager")
    else:
        compiled = replica
        if how == "submodule":
            replica.fuse = torch.compile(replica.fuse, backend="eager")
        else:
            replica.levels = torch.compile(replica.levels, backend="eager")
    assert find_fusions(compiled, x) == expected
    equalize_(compiled, [x])
    equalize_(net, [x])
    assert torch.equal(replica.get_submodule("fuse.0").weight, net.fuse[0].weight)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_activation_checkpointing_hides_nothing(x, reentrant, gradients):
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(gradients):
                both = checkpoint(self.levels, x, use_reentrant=reentrant)
                return checkpoint(self.fuse, both, use_reentrant=reentrant)

    x.requires_grad_(gradients)
    net = Checkpointed()
    fusion = find_fusions(net, x)[0]
    assert (fusion.name, fusion.branches[1].upsampling, fusion.norm) == ("fuse.0", 8.0, "fuse.1")
    assert not any(p.grad is not None for p in net.parameters())


def test_checkpoint_wrapper_keeps_plain_names(net, x):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    expected = [f.name for f in find_fusions(net, x)]
    net.fuse = checkpoint_wrapper(net.fuse)
    assert [f.name for f in find_fusions(net, x)] == expected
    equalize_(net, [x])


@pytest.mark.parametrize("how", ["traced", "exported"])
def test_graphs_of_the_network_are_watched_like_the_network(net, x, how):
    expected = find_fusions(net, x)[0]
    if how == "traced":
        graph = torch.fx.symbolic_trace(net)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.export.export(net, (x,)).module()
    (found,) = find_fusions(graph, x)
    assert (found.name, found.weight_shape) == (expected.name, expected.weight_shape)
    for branch, replica in zip(found.branches, expected.branches, strict=True):
        facts = ("start", "stop", "upsampling", "interpolation")
        assert [getattr(branch, f) for f in facts] == [getattr(replica, f) for f in facts]


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_equalized_networks_are_found_but_not_equalized_again(net, x, mode):
    expected = find_fusions(net, x)
    before = measure_scales(net, [x]).rows
    equalize_(net, [x], mode=mode)
    assert find_fusions(net, x) == expected
    after = measure_scales(net, [x]).rows
    assert [r["std"] for r in after] == pytest.approx([r["std"] for r in before])
    weights = copy.deepcopy(net.state_dict())
    again = equalize_(net, [x], mode=mode)
    assert "left alone: fuse.0: it is equalized already" in str(again)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert find_fusions(bake_(net), x) == expected
