"""BiFPN against the `effdet` package, with copied weights (pip install effdet)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seglab.models.necks import BiFPN
from seglab.models.necks.bifpn import plan_cell

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own deprecations
    effdet = pytest.importorskip("effdet.efficientdet", exc_type=ImportError)

CHANNELS = (6, 8, 10, 12)
WIDTH, REPEATS, LEVELS = 16, 2, (2, 9)


def reference(size: tuple[int, int], method: str, activation: str) -> nn.Module:
    from effdet.config import get_efficientdet_config

    config = get_efficientdet_config("tf_efficientdet_d0")
    config.update(
        min_level=LEVELS[0], max_level=LEVELS[1], num_levels=LEVELS[1] - LEVELS[0] + 1,
        fpn_channels=WIDTH, fpn_cell_repeats=REPEATS, fpn_name=method, image_size=size,
        act_type=activation,
    )  # fmt: skip
    return effdet.BiFpn(config, [{"num_chs": c} for c in CHANNELS])


def leaves(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of the module, in the order in which both libraries build them."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.BatchNorm2d)):
            yield from child.state_dict().values()


def matched(ours: BiFPN, theirs: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of tensors, node by node."""
    extra = list(theirs.resample.values())
    for mine, other in zip(ours.extra, extra, strict=True):
        yield from zip(leaves(mine), leaves(other), strict=True)
    for cell, other_cell in zip(ours.cells, theirs.cell, strict=True):
        for node, other in zip(cell.nodes, other_cell.fnode, strict=True):
            for mine, resample in zip(
                node.projections, other.combine.resample.values(), strict=True
            ):
                yield from zip(leaves(mine), leaves(resample), strict=True)
            if node.fuse.edge_weights is not None:
                yield node.fuse.edge_weights, other.combine.edge_weights
            yield from zip(leaves(node.conv), leaves(other.after_combine), strict=True)


def randomize(module: nn.Module) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            low, high = (0.1, 1.5) if name.endswith(("weights", "var")) else (-0.5, 0.5)
            nn.init.uniform_(value, low, high)


def features(size: tuple[int, int]) -> list[Tensor]:
    return [
        torch.randn(2, c, -(-size[0] // s), -(-size[1] // s), dtype=torch.float64)
        for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("size", [(512, 1024), (769, 769), (520, 900)])
@pytest.mark.parametrize(("method", "activation"), [("bifpn_fa", "swish"), ("bifpn_sum", "relu6")])
def test_pyramid_equals_effdets(size: tuple[int, int], method: str, activation: str) -> None:
    torch.manual_seed(0)
    theirs = reference(size, method, activation).double()
    randomize(theirs)
    factory: Any = {"swish": nn.SiLU, "relu6": nn.ReLU6}[activation]
    ours = BiFPN(
        CHANNELS, WIDTH, REPEATS, LEVELS, weighted=method == "bifpn_fa", activation=factory
    ).double()
    n_copied = 0
    with torch.no_grad():
        for mine, other in matched(ours, theirs):
            mine.copy_(other)
            n_copied += mine.is_floating_point() * mine.numel()
    floats = [v for v in theirs.state_dict().values() if v.is_floating_point()]
    assert n_copied == sum(v.numel() for v in floats)
    inputs = features(size)
    for training in (True, False):
        expected = theirs.train(training)(list(inputs))
        found = ours.train(training)(inputs)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for (_, a), (_, b) in zip(running(ours), running(theirs), strict=True):
        torch.testing.assert_close(a, b)


def running(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Sorted statistics, for momentum."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    return sorted((f"{m.running_mean.sum():.6f}", m.running_var) for m in norms)


def test_nodes_equal_effdets() -> None:
    from effdet.config.fpn_config import bifpn_config

    for levels in ((2, 9), (3, 7), (3, 9), (2, 5)):
        nodes = bifpn_config(*levels).nodes
        plans = plan_cell(levels[1] - levels[0] + 1)
        assert [(p.level + levels[0], list(p.inputs)) for p in plans] == [
            (node["feat_level"], list(node["inputs_offsets"])) for node in nodes
        ]
