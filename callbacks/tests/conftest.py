"""Toy networks that fuse branches, and the explicit form of each as the oracle."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from scale_equalization import ScaleEqualizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent))  # explicit_oracle and random_networks


def upsample(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class Fuse(nn.Module):
    """Two levels of fusion; `equalizers` (names of branches) makes the explicit form of it."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.fine = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(5, 4, 3, stride=2, padding=1)
        self.inner = nn.Conv2d(9, 7, 3, padding=1, bias=bias)
        self.inner_bn = nn.BatchNorm2d(7)
        self.outer = nn.Conv2d(13, 8, 3, padding=1, bias=bias)
        self.outer_bn = nn.BatchNorm2d(8)
        self.classify = nn.Conv2d(8, 3, 1)
        self.equalizers = nn.ModuleDict()

    def _equalized(self, name: str, x: Tensor) -> Tensor:
        return self.equalizers[name](x) if name in self.equalizers else x

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x).relu()
        middle = self.middle(fine).relu() * 3.0
        coarse = self.coarse(middle).relu()
        inner = [middle, upsample(coarse, middle)]
        inner = [self._equalized(f"inner{i}", b) for i, b in enumerate(inner)]
        mixed = self.inner_bn(self.inner(torch.cat(inner, dim=1))).relu()
        outer = [fine, upsample(mixed, fine)]
        outer = [self._equalized(f"outer{i}", b) for i, b in enumerate(outer)]
        return self.classify(self.outer_bn(self.outer(torch.cat(outer, dim=1))).relu())


@pytest.fixture
def make_network() -> Callable[..., Fuse]:
    """A Fuse network that depends on the seed only."""

    def make(seed: int = 0, bias: bool = False) -> Fuse:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Fuse(bias)

    return make


@pytest.fixture
def make_explicit(make_network: Callable[..., Fuse]) -> Callable[..., Fuse]:
    """The same network with explicit ScaleEqualizer modules, as a report says."""

    def make(report, seed: int = 0, bias: bool = False, center: bool = False) -> Fuse:
        network = make_network(seed, bias)
        for row in report.rows:
            mean = row["mean"] if center else 0.0
            network.equalizers[f"{row['fusion']}{row['branch']}"] = ScaleEqualizer(mean, row["std"])
        return network

    return make


@pytest.fixture
def batches() -> list[Tensor]:
    """Twelve batches whose scale varies from one to the next."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(4, 3, 16, 16, generator=generator) * (1.0 + 0.1 * (i % 3)) for i in range(12)
    ]


class Lit(L.LightningModule):
    """A LightningModule around Fuse that remembers the data it was trained on."""

    def __init__(self, network: nn.Module, rule: str = "sgd") -> None:
        super().__init__()
        self.network, self.rule = network, rule
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x.double().sum().item())
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        if self.rule == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.01)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


class Noisy(Dataset):
    """Images with an augmentation that draws from the global random streams."""

    def __init__(self, length: int = 48, noise: float = 0.1) -> None:
        self.noise = noise
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(length, 3, 16, 16, generator=generator)
        self.labels = (self.images.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] + self.noise * torch.randn(3, 16, 16), self.labels[index]


@pytest.fixture
def make_lit(make_network) -> Callable[..., Lit]:
    return lambda rule="sgd", **kwargs: Lit(make_network(**kwargs), rule)


@pytest.fixture
def loader() -> Callable[..., DataLoader]:
    def make(workers: int = 0, length: int = 48, **kwargs) -> DataLoader:
        options = {"batch_size": 4, "shuffle": True, "num_workers": workers, **kwargs}
        return DataLoader(Noisy(length), **options)

    return make


@pytest.fixture
def fit(tmp_path) -> Callable[..., L.Trainer]:
    """Train a Lit quietly on one CPU; seeds first, so that runs differ in their arguments only."""

    def run(lit, train, *callbacks, ckpt_path=None, val=None, trainer=L.Trainer, **options):
        L.seed_everything(7, workers=True)
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            "max_epochs": 2,
            "log_every_n_steps": 1,
        }
        machine = trainer(**{**quiet, **options}, callbacks=list(callbacks))
        machine.fit(lit, train, val, ckpt_path=ckpt_path)
        return machine

    return run


@pytest.fixture
def still(loader):
    """A loader that gives the same batches in the same order every time."""
    made = loader(shuffle=False)
    made.dataset.noise = 0.0
    return made


@pytest.fixture
def same():
    """Whether two modules have equal state dicts, to the last bit."""

    def compare(a: nn.Module, b: nn.Module) -> bool:
        left, right = a.state_dict(), b.state_dict()
        return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)

    return compare
