"""BiFPN (Tan et al. 2020): cells of weighted sums, top-down and then bottom-up, over many levels.

As in google/automl and efficientdet-pytorch: a node brings each of its inputs to its width and size
(1x1 convolution and batch normalization where channels differ, then max-pooling or nearest
neighbour), adds them with learned weights, and applies activation, depthwise 3x3, pointwise 1x1 and
batch normalization. The first cell has convolutions of its own for each use of an encoder level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seglab.models.necks.base import Neck
from seglab.models.necks.blocks import Projection, SeparableConv, pool_to
from seglab.models.necks.weighted_sum import WeightedSum

FINEST = 2  # the encoder's first level is P2, of stride 2 ** 2


@dataclass(frozen=True)
class NodePlan:
    """One node of a cell.

    Attributes:
        level: where its result lies, 0 the finest.
        inputs: what it adds. Numbers below that of levels are the cell's inputs; the node after
            those is the first one planned, and so on.
    """

    level: int
    inputs: tuple[int, ...]


def plan_cell(n_levels: int, finest_only: bool = False) -> list[NodePlan]:
    """List the nodes of a cell: top-down n - 1 of them, then bottom-up n - 1.

    Args:
        n_levels: number n of levels.
        finest_only: leave out the way up, whose results the finest level does not see.

    >>> [plan.inputs for plan in plan_cell(3)]
    [(1, 2), (0, 3), (1, 3, 4), (2, 5)]
    """
    ids = [[level] for level in range(n_levels)]
    plans: list[NodePlan] = []

    def add(level: int, *inputs: int) -> None:
        ids[level].append(n_levels + len(plans))
        plans.append(NodePlan(level, inputs))

    for level in range(n_levels - 2, -1, -1):
        add(level, ids[level][-1], ids[level + 1][-1])
    for level in range(1, 1 if finest_only else n_levels):
        add(level, *ids[level], ids[level - 1][-1])
    return plans


class Node(nn.Module):
    """Weighted sum of maps brought to one width and size, activation, separable convolution."""

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        weighted: bool,
        activation: Callable[[], nn.Module],
        bias: bool,
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(Projection(c, channels, bias) for c in in_channels)
        self.fuse = WeightedSum(len(in_channels), mode="nearest", learned=weighted)
        self.activate = activation()
        self.conv = SeparableConv(channels, channels, bias)

    def forward(self, inputs: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Fuse maps (B, C_i, h_i, w_i) into (B, channels, *size)."""
        projected = [project(x) for project, x in zip(self.projections, inputs, strict=True)]
        fused = self.fuse([pool_to(x, size) for x in projected], size)
        mixed: Tensor = self.conv(self.activate(fused))
        return mixed


class Cell(nn.Module):
    """One pass down and up the pyramid; its output on each level is the last node there."""

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        weighted: bool,
        activation: Callable[[], nn.Module],
        bias: bool,
        finest_only: bool,
    ) -> None:
        super().__init__()
        self.plans = plan_cell(len(in_channels), finest_only)
        widths = [*in_channels, *[channels] * len(self.plans)]
        self.nodes = nn.ModuleList(
            Node([widths[i] for i in plan.inputs], channels, weighted, activation, bias)
            for plan in self.plans
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Map every level (B, C_i, h_i, w_i) to (B, channels, h_i, w_i), fine to coarse."""
        maps, last = list(levels), list(levels)
        for plan, node in zip(self.plans, self.nodes, strict=True):
            height, width = levels[plan.level].shape[-2:]
            maps.append(node([maps[i] for i in plan.inputs], (height, width)))
            last[plan.level] = maps[-1]
        return last


class BiFPN(Neck):
    """Bidirectional feature pyramid with learned weights, on more levels than the encoder has.

    Levels above the encoder's are made by max-pooling, the first after a 1x1 convolution and batch
    normalization. Sizes are halved by rounding up, so any image size goes.

    Args:
        in_channels: channels of every encoder level, fine to coarse, the first of stride 4 (P2).
        channels: width of every map of the pyramid.
        repeats: number of cells.
        levels: finest and coarsest level; P_i has stride 2 ** i.
        weighted: fast normalized fusion; False adds (EfficientDet-Lite).
        activation: called for each node's activation; EfficientDet has SiLU, its lite form ReLU6.
        bias: whether convolutions have a bias before their normalization, as EfficientDet's do.
        finest_only: return the finest level alone; the last cell's way up is then not built.

    Exported with sizes that are left open, these have to be multiples of the coarsest stride.

    Raises:
        ValueError: levels that the encoder does not have, fewer than two levels, or no cell.

    >>> import torch
    >>> neck = BiFPN([16, 32], 8, repeats=1, levels=(2, 5)).eval()
    >>> maps = neck([torch.zeros(1, 16, 9, 12), torch.zeros(1, 32, 5, 6)])
    >>> [tuple(x.shape[2:]) for x in maps]
    [(9, 12), (5, 6), (3, 3), (2, 2)]
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 64,
        repeats: int = 3,
        levels: tuple[int, int] = (2, 9),
        weighted: bool = True,
        activation: Callable[[], nn.Module] = nn.SiLU,
        bias: bool = True,
        finest_only: bool = False,
    ) -> None:
        super().__init__()
        finest, coarsest = _checked(levels, len(in_channels))
        if repeats < 1:
            raise ValueError(f"a BiFPN needs repeats >= 1, got {repeats}")
        self.levels = (finest, coarsest)
        n_levels = coarsest - finest + 1
        self.channels = (channels,) * (1 if finest_only else n_levels)
        self.taken = slice(finest - FINEST, coarsest - FINEST + 1)
        widths = list(in_channels[self.taken])
        n_extra = n_levels - len(widths)
        self.extra = nn.ModuleList(
            Projection(width, channels, bias)
            for width in [widths[-1], *[channels] * n_extra][:n_extra]
        )
        widths += [channels] * n_extra
        self.cells = nn.ModuleList(
            Cell(
                [channels] * n_levels if index else widths,
                channels,
                weighted,
                activation,
                bias,
                finest_only and index == repeats - 1,
            )
            for index in range(repeats)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map features (B, C_i, h_i, w_i), fine to coarse, to (B, channels, h, w) on each level."""
        maps = list(features[self.taken])
        _require_steady_strides(maps[0], 2 ** (self.levels[1] - self.levels[0]), self.levels)
        for project in self.extra:
            height, width = maps[-1].shape[-2:]
            maps.append(pool_to(project(maps[-1]), ((height + 1) // 2, (width + 1) // 2)))
        for cell in self.cells:
            maps = cell(maps)
        return maps[: len(self.channels)]


def _checked(levels: tuple[int, int], n_features: int) -> tuple[int, int]:
    finest, coarsest = levels
    if not FINEST <= finest < FINEST + n_features or coarsest <= finest:
        raise ValueError(
            f"levels={tuple(levels)} is impossible on an encoder with P{FINEST} to "
            f"P{FINEST + n_features - 1}: the first must be one of these, the second above it"
        )
    return finest, coarsest


def _require_steady_strides(finest: Tensor, ratio: int, levels: tuple[int, int]) -> None:
    """Refuse an open size whose levels would be pooled by one stride here, by another there.

    A graph holds constant strides; only where every level halves exactly is that right for all.
    """
    if not getattr(torch.compiler, "is_exporting", bool)():  # torch 2.6 cannot tell
        return
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    for length in finest.shape[-2:]:
        if isinstance(length, torch.SymInt) and not statically_known_true(length % ratio == 0):
            stride = 2 ** levels[1]
            raise ValueError(
                f"a BiFPN of levels P{levels[0]} to P{levels[1]} is exported with open sizes only "
                f"if these are multiples of {stride}: dynamic_shapes={{'image': {{2: {stride} * "
                f"Dim('h', min=1), 3: {stride} * Dim('w', min=1)}}}}, or leave out dynamic_shapes"
            )
