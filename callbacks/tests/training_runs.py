"""A small LightningModule, data with outliers, and samplers that avoid them."""

from __future__ import annotations

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from explicit_oracle import states_equal
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    SubsetRandomSampler,
)


def slow_workers(kinds):
    """The names of the cases; those that start processes are slow."""
    return [pytest.param(k, marks=pytest.mark.slow) if "worker" in k else k for k in kinds]


TAME, WILD = 32, 64  # the first 32 samples have a std of about 1, the others of about 1000


class Net(nn.Module):
    """The input beside a projection of it; the input's row tells which samples were drawn."""

    def __init__(self, seed: int = 0, name: str = "fuse1") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.branch = nn.Linear(4, 4)
            self.add_module(name, nn.Linear(8, 4))
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 2)
        self.name = name

    def forward(self, x):
        fused = getattr(self, self.name)(torch.cat([x, 3.0 * self.branch(x)], -1))
        return self.head(self.norm(fused))


class Task(L.LightningModule):
    """Remembers what it was trained on."""

    def __init__(self, seed: int = 0, name: str = "fuse1", key: str | None = None) -> None:
        super().__init__()
        self.network, self.key = Net(seed, name), key
        self.seen: list[float] = []

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, index):
        x = batch if self.key is None else batch[self.key]
        self.seen.append(x.double().sum().item())
        return self(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Vectors(Dataset):
    """Vectors of 4, or with `lengths` sequences of them."""

    def __init__(self, lengths: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        scales = torch.ones(WILD)
        scales[TAME:] = 1000.0
        x = torch.randn(WILD, 6, 4, generator=generator) * scales[:, None, None]
        self.items = [x[i, : 2 + i % 2 * 4] if lengths else x[i, 0] for i in range(WILD)]

    def __len__(self) -> int:
        return WILD

    def __getitem__(self, index):
        return self.items[index]

    def std(self, indices) -> float:
        return float(
            np.concatenate([self.items[i].double().numpy().ravel() for i in indices]).std()
        )


class Buckets:
    """Batches of equal length, tame samples only; the order is the sampler's own affair."""

    def __init__(self) -> None:
        self.random = random.Random(3)

    def __len__(self) -> int:
        return TAME // 4

    def __iter__(self):
        batches = [
            list(range(parity, TAME, 2))[i : i + 4] for parity in (0, 1) for i in range(0, 16, 4)
        ]
        self.random.shuffle(batches)
        yield from batches


class Sampler:
    """A sampler that inherits nothing and has a stream of its own."""

    def __init__(self) -> None:
        self.random = random.Random(3)

    def __len__(self) -> int:
        return TAME

    def __iter__(self):
        return iter(self.random.sample(range(TAME), TAME))


LOADERS = {
    "subset": lambda: DataLoader(Vectors(), 4, sampler=SubsetRandomSampler(range(TAME))),
    "subset with generator": lambda: DataLoader(
        Vectors(), 4, sampler=SubsetRandomSampler(range(TAME), torch.Generator().manual_seed(5))
    ),
    "own sampler": lambda: DataLoader(Vectors(), 4, sampler=Sampler()),
    "list of indices": lambda: DataLoader(Vectors(), 4, sampler=list(range(TAME))),
    "buckets": lambda: DataLoader(Vectors(lengths=True), batch_sampler=Buckets()),
    "unbatched": lambda: DataLoader(Vectors(), None, sampler=Sampler()),
    "workers": lambda: DataLoader(Vectors(), 4, sampler=Sampler(), num_workers=1),
}


def run_with(fit, loader, callback=None, task=None, **options):
    """Train; returns the task."""
    task = Task() if task is None else task
    fit(task, loader, *([] if callback is None else [callback]), **{"max_epochs": 1, **options})
    return task


def same_run(a: Task, b: Task) -> bool:
    return a.seen == b.seen and states_equal(a, b)
