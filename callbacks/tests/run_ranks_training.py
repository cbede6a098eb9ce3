"""Started by test_ranks.py: trains under DistributedDataParallel, or in one process.

Not a test: `python -m torch.distributed.run --nproc-per-node 2 run_ranks_training.py FOLDER`.
Two ranks train on the two halves of each batch, one process on the whole.
"""

from __future__ import annotations

import itertools
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from scale_equalization import bake_, equalize_, equivalent_param_groups
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

MODES = ("fold", "reparametrize", "groups")
RULES = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "decay": (torch.optim.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


class Net(nn.Module):
    """Two nested fusions without batch statistics, which would differ between halves."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Conv2d(7, 4, 3, padding=1)
        self.outer = nn.Conv2d(8, 4, 3, padding=1)
        self.classify = nn.Conv2d(4, 3, 1)
        self.spare = nn.Linear(2, 2)  # never used: what find_unused_parameters is for

    def forward(self, x):
        fine = self.fine(x).relu()
        inner = self.inner(torch.cat([x * 0.2, fine * 4], 1)).relu()
        return self.classify(self.outer(torch.cat([fine, inner], 1)).tanh())


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)


def train(network, optimizer, part: slice, accumulate: int) -> None:
    """Six steps of the network, which may be wrapped, on a part of every batch."""
    for step, micro in itertools.product(range(6), range(accumulate)):
        last = micro == accumulate - 1
        x = batch(100 + step * 5 + micro)[part]
        hold = hasattr(network, "no_sync") and not last
        with network.no_sync() if hold else nullcontext():
            loss = nn.functional.cross_entropy(network(x), (x.sum(1) > 0).long())
            (loss / accumulate).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()


def optimizer_for(network, report, mode: str, rule: str) -> torch.optim.Optimizer:
    make, options = RULES[rule]
    if mode != "groups":
        return make([p for p in network.parameters() if p.requires_grad], **options)
    known = {k: v for k, v in options.items() if k in ("lr", "weight_decay")}
    name = "adamw" if rule == "adamw" else "sgd"
    return make(equivalent_param_groups(network, report, name, **known), **options)


def case(
    rank: int, world: int, mode: str, rule: str, unused: bool, accumulate: int, bucket: bool
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = Net().double()
    network.spare.requires_grad_(unused)
    wrapped: nn.Module = network
    if world > 1:  # wrapped first, as in Lightning: the parameters must stay those that it knows
        wrapped = DistributedDataParallel(
            network, find_unused_parameters=unused, gradient_as_bucket_view=bucket
        )
    how = "fold" if mode == "groups" else mode
    report = equalize_(wrapped, [batch(i) for i in range(rank, 8, world)], mode=how)
    width = 8 // world
    train(
        wrapped,
        optimizer_for(network, report, mode, rule),
        slice(rank * width, rank * width + width),
        accumulate,
    )
    return bake_(network).state_dict()


if __name__ == "__main__":
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        distributed.init_process_group("gloo")
    cases = [(m, r, False, 1, False) for m in MODES for r in RULES]
    cases += [(m, "sgd", True, 1, False) for m in MODES]
    cases += [(m, "adamw", False, 3, bucket) for m in MODES for bucket in (False, True)]
    results: dict[tuple, dict] = {}
    for arguments in cases:
        results[arguments] = case(rank, world, *arguments)
    torch.save(results, Path(sys.argv[1], f"{rank}.pt"))
    if world > 1:
        distributed.destroy_process_group()
