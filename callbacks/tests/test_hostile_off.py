"""`mode="off"` is bit-identical to a run without the callback, wherever random streams hide."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scale_equalization import ScaleEqualizationCallback, ScaleEqualizationError
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    random_split,
)
from training_runs import (
    TAME,
    WILD,
    Task,
    Vectors,
    run_with,
    same_run,
    slow_workers,
)


class OwnStream(Dataset):
    """Augments with a stream that belongs to the dataset, as albumentations does."""

    def __init__(self, stream="numpy", seed: int = 1) -> None:
        self.items = Vectors()
        self.draw = {
            "numpy": np.random.default_rng(seed).normal,
            "python": random.Random(seed).gauss,
            "legacy": np.random.RandomState(seed).normal,
        }[stream]
        self.served = 0

    def __len__(self) -> int:
        return TAME

    def __getitem__(self, index):
        self.served += 1
        return self.items[index] * (1.0 + 0.1 * float(self.draw(0.0, 1.0))) + 0.001 * self.served


class Stream(IterableDataset):
    """A stream that starts afresh at every epoch but draws on."""

    def __init__(self) -> None:
        self.random = random.Random(2)

    def __iter__(self):
        for item in Vectors().items[:TAME]:
            yield item * (1.0 + self.random.random())


class OneShot(IterableDataset):
    """A stream that can be read once."""

    def __init__(self) -> None:
        self.stream = iter(Vectors().items[:TAME])

    def __iter__(self):
        return self.stream


class CountingCollate:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, items):
        self.calls += 1
        return torch.stack(items) * (1.0 + 0.1 * self.calls)


STREAMS = {
    "numpy generator": lambda: DataLoader(OwnStream("numpy"), 4, shuffle=True),
    "python random": lambda: DataLoader(OwnStream("python"), 4, shuffle=True),
    "numpy legacy": lambda: DataLoader(OwnStream("legacy"), 4),
    "concatenated": lambda: DataLoader(ConcatDataset([OwnStream(), OwnStream(seed=4)]), 4),
    "subset": lambda: DataLoader(torch.utils.data.Subset(OwnStream(), range(20)), 4),
    "loader's generator": lambda: DataLoader(
        Vectors(), 4, shuffle=True, generator=torch.Generator().manual_seed(9)
    ),
    "iterable": lambda: DataLoader(Stream(), 4),
    "collate": lambda: DataLoader(Vectors(), 4, collate_fn=CountingCollate()),
    "persistent worker": lambda: DataLoader(
        OwnStream(), 4, num_workers=1, persistent_workers=True, shuffle=True
    ),
}


@pytest.mark.parametrize("kind", slow_workers(STREAMS))
def test_off_is_bit_identical_with_streams_of_the_data(fit, kind):
    control = run_with(fit, STREAMS[kind](), max_epochs=1)
    callback = ScaleEqualizationCallback("off", verbose=False)
    watched = run_with(fit, STREAMS[kind](), callback, max_epochs=1)
    assert len(callback.report.rows) == 2
    assert same_run(control, watched)


def test_one_shot_stream_is_kept_or_said(fit):
    control = run_with(fit, DataLoader(OneShot(), 4))
    callback, watched = ScaleEqualizationCallback("off", verbose=False), Task()
    try:
        run_with(fit, DataLoader(OneShot(), 4), callback, watched)
    except ScaleEqualizationError:
        return  # refused: a loader= of its own is the cure
    assert same_run(control, watched) or callback.report.notes


class Splits(Task):
    """Draws its split from the global stream whenever it is asked for a loader."""

    def train_dataloader(self):
        some, _ = random_split(Vectors(), [TAME, WILD - TAME])
        return DataLoader(some, 4, shuffle=True)


class Counts(Task):
    """Its forward depends on how often it was called."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.network(x) * (1.0 + 0.1 * self.calls)


class Logs(Task):
    def forward(self, x):
        self.log("mean", x.mean())
        return self.network(x)


class Drops(Task):
    def forward(self, x):
        noise = 0.1 * np.random.randn() + 0.1 * random.random()
        return nn.functional.dropout(self.network(x), 0.5, self.training) + noise


@pytest.mark.parametrize("kind", [Splits, Counts, Logs, Drops], ids=lambda kind: kind.__name__)
def test_off_is_bit_identical_with_streams_of_the_module(fit, kind):
    def loader():
        return None if kind is Splits else DataLoader(Vectors(), 4, shuffle=True)

    control = run_with(fit, loader(), task=kind(), max_epochs=1)
    callback = ScaleEqualizationCallback("off", verbose=False)
    watched = run_with(fit, loader(), callback, kind(), max_epochs=1)
    assert len(callback.report.rows) == 2
    assert same_run(control, watched)


def test_logging_in_forward_does_not_stop_the_run(fit):
    callback = ScaleEqualizationCallback(verbose=False)
    run_with(fit, DataLoader(Vectors(), 4), callback, Logs())
    assert len(callback.report.rows) == 2
