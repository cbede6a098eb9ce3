"""A run with mode="off" is bit-identical to one without the callback, whoever keeps state where."""

from __future__ import annotations

import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from scale_equalization import ScaleEqualizationCallback
from scale_equalization.snapshots import as_before, iterators_in
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, random_split

GLOBAL = np.random.default_rng(3)


class Jitter:
    """A transform with random streams of its own, of every kind, and a counter."""

    def __init__(self) -> None:
        self.python, self.numpy = random.Random(1), np.random.default_rng(1)
        self.old, self.torch = np.random.RandomState(1), torch.Generator().manual_seed(1)
        self.calls, self.history, self.ticks = 0, [], torch.zeros(1)

    def __call__(self, x):
        self.calls += 1
        self.ticks += 1
        self.history.append(self.calls % 7)
        noise = self.python.random() + self.numpy.random() + self.old.rand() + GLOBAL.random()
        return x + noise + torch.rand(1, generator=self.torch) + self.calls * 1e-3


class Compose:
    def __init__(self, transforms) -> None:
        self.transforms = transforms

    def __call__(self, x):
        for transform in self.transforms:
            x = transform(x)
        return x


def closure():
    generator = np.random.default_rng(5)
    return lambda x: x * float(generator.uniform(0.5, 2.0))


class Images(Dataset):
    def __init__(self, transform=None, length: int = 16) -> None:
        self.x = torch.randn(length, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.transform = transform or (lambda x: x)
        self.cache: dict[int, torch.Tensor] = {}
        self.lock = __import__("threading").Lock()  # cannot be copied

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        self.cache.setdefault(index, self.transform(self.x[index]))
        return self.transform(self.x[index]) + 0.1 * self.cache[index]


class Shuffling(IterableDataset):
    """Shuffles its own list with its own stream whenever it is read."""

    def __init__(self) -> None:
        self.order, self.random = list(range(16)), random.Random(2)
        self.images = Images()

    def __iter__(self):
        self.random.shuffle(self.order)
        return (self.images[index] for index in self.order)


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fuse, self.norm = nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2)
        self.calls, self.log_calls, self.seen = 0, [], []
        self.noise = torch.Generator().manual_seed(4)

    def forward(self, x):
        self.calls += 1
        self.log_calls.append(self.calls)
        self.log("mean", x.mean())
        self.last = x.mean().item()
        x = x + 0.01 * self.calls * torch.randn(x.shape, generator=self.noise)
        return self.norm(self.fuse(torch.cat([x, x.flip(3)], 1)))

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.double().sum().item())
        return (self(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Splitting(Lit):
    """Splits inside train_dataloader, by the global stream, and counts how often it was asked."""

    asked = 0

    def train_dataloader(self):
        self.asked += 1
        self.train_set, _ = random_split(Images(Jitter()), [12, 4])
        return DataLoader(self.train_set, 4, shuffle=True)


def transformed(*transforms):
    return lambda: DataLoader(Images(Compose(list(transforms))), 4, shuffle=True)


def generator_of_a_loader():
    return DataLoader(Images(), 4, shuffle=True, generator=torch.Generator().manual_seed(9))


CASES = {
    "own streams": lambda: transformed(Jitter())(),
    "closure": lambda: transformed(closure(), Jitter())(),
    "concatenated": lambda: DataLoader(
        ConcatDataset([Images(Jitter()), Images(Compose([Jitter(), closure()]))]), 4, shuffle=True
    ),
    "shuffling stream": lambda: DataLoader(Shuffling(), 4),
    "generator of the loader": generator_of_a_loader,
    "collate function": lambda: DataLoader(
        Images(),
        4,
        collate_fn=lambda xs, jitter=Jitter(): jitter(torch.stack(xs)),  # noqa: B008
    ),
    "several loaders": lambda: {"only": DataLoader(Images(Jitter()), 4, shuffle=True)},
}


def outcome(fit, make_lit, make_loader, callbacks) -> dict:
    GLOBAL.bit_generator.state = np.random.default_rng(3).bit_generator.state
    L.seed_everything(3)
    lit = make_lit()
    if isinstance(make_loader and make_loader(), dict):
        step = lit.training_step
        lit.training_step = lambda batch, batch_idx: step(batch["only"], batch_idx)
    fit(lit, make_loader() if make_loader else None, *callbacks, max_epochs=2)
    return {
        "weights": {k: v.tolist() for k, v in lit.state_dict().items()},
        "attributes": (lit.calls, lit.log_calls, lit.seen, lit.last, getattr(lit, "asked", 0)),
        "streams": (random.random(), torch.rand(1).item(), np.random.rand(), GLOBAL.random()),
    }


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.parametrize("name", CASES)
def test_off_is_bit_identical_with_state_anywhere(fit, name):
    off = ScaleEqualizationCallback(mode="off", verbose=False)
    without = outcome(fit, Lit, CASES[name], [])
    assert outcome(fit, Lit, CASES[name], [off]) == without
    assert off.report.batches > 1


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
def test_off_is_bit_identical_with_a_split_in_train_dataloader(fit):
    off = ScaleEqualizationCallback(mode="off", verbose=False)
    assert outcome(fit, Splitting, None, [off]) == outcome(fit, Splitting, None, [])


def test_off_is_bit_identical_with_albumentations(fit):
    albumentations = pytest.importorskip("albumentations")

    class Albumented(Images):
        def __getitem__(self, index):
            image = self.x[index].permute(1, 2, 0).numpy()
            return torch.from_numpy(self.transform(image=image)["image"]).permute(2, 0, 1)

    def loader():
        steps = [albumentations.HorizontalFlip(p=0.5), albumentations.RandomCrop(7, 7)]
        return DataLoader(Albumented(albumentations.Compose(steps, seed=1)), 4, shuffle=True)

    off = ScaleEqualizationCallback(mode="off", verbose=False)
    assert outcome(fit, Lit, loader, [off]) == outcome(fit, Lit, loader, [])


def test_exception_restores_as_well():
    jitter = Jitter()

    def fail():
        with as_before(jitter):
            jitter(torch.zeros(1))
            jitter.extra = 1
            raise KeyError("while measuring")

    with pytest.raises(KeyError, match="while measuring"):
        fail()
    fresh = Jitter()
    assert (jitter.calls, jitter.history, jitter.ticks.item()) == (0, [], 0.0)
    assert not hasattr(jitter, "extra")
    assert jitter.numpy.random() == fresh.numpy.random()
    assert torch.equal(torch.rand(3, generator=jitter.torch), torch.rand(3, generator=fresh.torch))


def test_containers_keep_their_identity_and_order():
    class Holder:
        def __init__(self):
            self.mapping, self.items, self.names = {"a": 1, "b": 2}, [[1], [2]], {"x"}

    holder = Holder()
    inner, mapping = holder.items[0], holder.mapping
    with as_before(holder):
        holder.mapping["c"] = holder.mapping.pop("a")
        inner.append(5)
        holder.items.reverse()
        holder.names.add("y")
    assert holder.mapping is mapping
    assert list(mapping.items()) == [("a", 1), ("b", 2)]
    assert holder.items == [[1], [2]]
    assert holder.items[0] is inner
    assert holder.names == {"x"}


def test_large_arrays_are_data_and_files_are_named(tmp_path):
    class Holder:
        def __init__(self):
            self.data, self.count = torch.zeros(2**19), np.zeros(3)
            self.file = (tmp_path / "x").open("w")

    holder = Holder()
    with as_before(holder):
        holder.data += 1
        holder.count += 1
    assert holder.data.sum() == 2**19
    assert holder.count.sum() == 0
    assert iterators_in(holder) == ["TextIOWrapper"]
    holder.file.close()
