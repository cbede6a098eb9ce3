"""Calibration draws what training draws: any sampler, any loader, any number of ranks."""

from __future__ import annotations

import itertools
import random

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from scale_equalization import ScaleEqualizationCallback, ScaleEqualizationError
from scale_equalization.loaders import calibration_loader
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return index


def drawn(loader, **options) -> list[list[int]]:
    return [batch.tolist() for batch in calibration_loader(loader, **options)]


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


# -- which samples ---------------------------------------------------------------------------


def test_subset_sampler_draws_its_subset_only():
    loader = DataLoader(Numbers(), batch_size=3, sampler=SubsetRandomSampler([1, 4, 7, 9, 12]))
    assert sorted(flat(drawn(loader))) == [1, 4, 7, 9, 12]


def test_weighted_sampler_draws_by_its_weights():
    weights = [0.0] * 10 + [1.0] * 9 + [91.0]
    sampler = WeightedRandomSampler(weights, 400)
    samples = flat(drawn(DataLoader(Numbers(), batch_size=4, sampler=sampler)))
    assert len(samples) == 400
    assert min(samples) >= 10
    assert samples.count(19) / 400 == pytest.approx(0.91, abs=0.06)


class Buckets:
    """Batches of neighbours, of different widths, shuffled by Python's random."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self):
        self.epoch += 1
        batches = [[0, 1], [2, 3, 4], [5], [6, 7, 8, 9]]
        random.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return 4


def test_bucket_batches_stay_together():
    loader = DataLoader(Numbers(), batch_sampler=Buckets())
    assert sorted(drawn(loader)) == [[0, 1], [2, 3, 4], [5], [6, 7, 8, 9]]


def test_batches_of_an_ordered_loader_stay_together():
    batches = drawn(DataLoader(Numbers(), batch_size=4))
    assert sorted(batches) == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    assert batches != sorted(batches)  # or else measuring would stop within the first classes


def test_whole_batches_given_by_index_are_kept():
    class Whole(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.full((3,), index)

    batches = drawn(DataLoader(Whole(), batch_size=None, shuffle=True))
    assert sorted(batches) == [[i] * 3 for i in range(5)]
    lists = DataLoader(
        TensorDataset(torch.arange(6)),
        batch_size=None,
        sampler=BatchSampler(range(6), 2, drop_last=False),
    )
    assert sorted(b[0].tolist() for b in calibration_loader(lists)) == [[0, 1], [2, 3], [4, 5]]


def test_endless_sampler_is_cut():
    class Endless(torch.utils.data.Sampler):
        def __iter__(self):
            while True:
                yield from range(3)

    batches = drawn(DataLoader(Numbers(3), batch_size=2, sampler=Endless()))
    assert len(batches) == 64


def test_subclass_of_the_loader_is_kept():
    class Doubling(DataLoader):
        def __init__(self, dataset, factor, **options):
            super().__init__(dataset, **options)
            self.factor = factor

        def __iter__(self):
            return (batch * self.factor for batch in super().__iter__())

    assert sorted(flat(drawn(Doubling(Numbers(4), 10, batch_size=2)))) == [0, 10, 20, 30]


@pytest.mark.parametrize(("length", "sizes"), [(1, [1]), (4, [2, 2]), (5, [2, 2])])
def test_batches_hold_two_samples_at_least(length, sizes):
    loader = DataLoader(Numbers(length), batch_size=1, shuffle=True)
    assert [len(batch) for batch in drawn(loader)] == sizes


@pytest.mark.parametrize(("drop", "sizes"), [(True, [4, 4]), (False, [2, 4, 4])])
def test_last_batch_is_dropped_as_in_training(drop, sizes):
    batches = drawn(DataLoader(Numbers(10), batch_size=4, drop_last=drop))
    assert sorted(map(len, batches)) == sizes


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ScaleEqualizationError, match="batch_size=4, drop_last=False"):
        drawn(DataLoader(Numbers(0), batch_size=4))


# -- how many --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [3, 0.6])
def test_ordered_loader_is_limited_to_what_training_takes(limit):
    assert sorted(flat(drawn(DataLoader(Numbers(), batch_size=4), epoch_batches=limit))) == list(
        range(12)
    )
    shuffled = DataLoader(Numbers(), batch_size=4, shuffle=True)
    assert sorted(flat(drawn(shuffled, epoch_batches=limit))) == list(range(20))


@pytest.mark.parametrize("n", [1, 3])
def test_at_most_so_many_batches(n):
    assert len(drawn(DataLoader(Numbers(), batch_size=4, shuffle=True), max_batches=n)) == n


def test_in_order_takes_the_first_batches():
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True)
    assert drawn(loader, epoch_batches=2, in_order=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_seed_orders_batches_and_draws():
    loader = DataLoader(Numbers(200), batch_size=4, sampler=RandomSampler(Numbers(200)))
    assert drawn(loader, seed=1) == drawn(loader, seed=1)
    assert drawn(loader, seed=1) != drawn(loader, seed=2)


# -- ranks -------------------------------------------------------------------------------------


@pytest.fixture
def ranks(monkeypatch):
    """What each of two ranks draws, given what each rank's loader is."""

    def run(loaders, **options):
        def gather_for(rank):
            seen = [
                [len(b), b]
                for b in (
                    drawn(loader, **{k: v for k, v in options.items() if k != "max_batches"})
                    for loader in loaders
                )
            ]
            counts = iter([["same", "same"] if seen[0] == seen[1] else ["a", "b"]])
            return lambda value: next(counts, [n for n, _ in seen])

        results = []
        for rank, loader in enumerate(loaders):
            gather = gather_for(rank)
            with monkeypatch.context() as patch:
                patch.setattr("scale_equalization.loaders.gather", gather)
                results.append(drawn(loader, rank=rank, world_size=2, **options))
        return results

    return run


def test_ranks_get_equal_numbers_of_disjoint_batches(ranks):
    loader = DataLoader(Numbers(20), batch_size=4, shuffle=True)
    first, second = ranks([loader, loader])
    assert len(first) == len(second) == 2
    assert len(set(flat(first) + flat(second))) == 16
    one, other = ranks([loader, loader], max_batches=1)
    assert one == other
    assert len(one) == 1


def test_sampler_that_knows_the_ranks_is_not_dealt_again(ranks):
    halves = [DataLoader(Numbers(20), batch_size=2, sampler=range(r, 20, 2)) for r in (0, 1)]
    first, second = ranks(halves)
    assert sorted(flat(first)) == list(range(0, 20, 2))
    assert sorted(flat(second)) == list(range(1, 20, 2))
    uneven = [DataLoader(Numbers(20), batch_size=2, sampler=range(n)) for n in (12, 4)]
    assert [len(batches) for batches in ranks(uneven)] == [2, 2]


# -- streams and several loaders -----------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, source) -> None:
        self.source = source

    def __iter__(self):
        return iter(self.source)


def test_streams_are_read_from_their_beginning():
    stream = DataLoader(Stream(range(6)), batch_size=2)
    assert drawn(stream) == [[0, 1], [2, 3], [4, 5]]
    assert len(drawn(DataLoader(Stream(itertools.repeat(1)), 2), one_shot=True)) == 64
    assert drawn([torch.tensor([1]), torch.tensor([2])], max_batches=1) == [[1]]


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (iter([1]), "list_iterator"),
        ((i for i in range(3)), "generator"),
        (DataLoader(Stream(iter([1, 2]))), "stream over a list_iterator"),
        (DataLoader(Stream(i for i in range(3))), "stream over a generator"),
    ],
)
def test_one_shot_data_is_refused_not_eaten(source, kind):
    with pytest.raises(ScaleEqualizationError, match=rf"{kind}.*once only.*loader="):
        drawn(source)
    assert len(list(source)) in (1, 2, 3)


def test_combined_loaders_are_drawn_together():
    pair = {"a": DataLoader(Numbers(4), 2), "b": DataLoader(Numbers(8), 2, shuffle=True)}
    batches = list(calibration_loader(CombinedLoader(pair, "max_size_cycle")))
    assert len(batches) == 4
    assert sorted(flat([batch["b"].tolist() for batch in batches])) == list(range(8))
    one_by_one = CombinedLoader(list(pair.values()), "sequential")
    assert len(list(calibration_loader(one_by_one))) == 6


# -- through the callback: the figures -----------------------------------------------------


class Wild(Dataset):
    """Two samples in a hundred, which no sampler here draws, are a thousand times larger."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(100, 3, 8, 8, generator=generator)
        self.x[50:] *= 1000

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index):
        return self.x[index], self.x[index] * 2


class Two(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.fuse(torch.cat([x, x.flip(3)], 1))

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "how",
    [
        {"sampler": SubsetRandomSampler(range(50))},
        {"sampler": WeightedRandomSampler([1.0] * 50 + [0.0] * 50, 50)},
        {"batch_sampler": [list(range(i, i + 5)) for i in range(0, 50, 5)]},
    ],
    ids=["subset", "weighted", "batches"],
)
def test_callback_measures_what_the_sampler_draws(fit, how):
    callback = ScaleEqualizationCallback(tolerance=0)
    options = {} if "batch_sampler" in how else {"batch_size": 5}
    fit(Two(), DataLoader(Wild(), **options, **how), callback, max_steps=0, max_epochs=1)
    assert callback.report.rows[0]["std"] == pytest.approx(1.0, rel=0.1)


def test_loader_given_is_measured_instead(fit):
    callback = ScaleEqualizationCallback(loader=(5 * torch.randn(4, 3, 8, 8) for _ in range(9)))
    fit(Two(), DataLoader(Wild(), 5), callback, max_steps=0, max_epochs=1)
    assert callback.report.rows[0]["std"] == pytest.approx(5.0, rel=0.1)


def test_first_of_several_loaders_is_said(fit):
    callback, lit = ScaleEqualizationCallback(tolerance=0), Two()
    lit.training_step = lambda batch, batch_idx: lit(batch["calm"][0]).square().mean()
    calm = DataLoader(Wild(), 5, sampler=range(50))
    fit(lit, {"calm": calm, "wild": DataLoader(Wild(), 5)}, callback, max_steps=0, max_epochs=1)
    assert callback.report.rows[0]["std"] == pytest.approx(1.0, rel=0.1)
    assert "of 2 training loaders" in str(callback.report)
    everything = ScaleEqualizationCallback(
        tolerance=0,
        forward=lambda module, batch: [module(batch[key][0]) for key in ("calm", "wild")],
    )
    lit = Two()
    lit.training_step = lambda batch, batch_idx: lit(batch["calm"][0]).square().mean()
    loaders = {"calm": calm, "wild": DataLoader(Wild(), 5)}
    fit(lit, loaders, everything, max_steps=0, max_epochs=1)
    cycled = np.concatenate([np.tile(Wild().x[:50], (2, 1, 1, 1)), Wild().x])
    assert everything.report.rows[0]["std"] == pytest.approx(cycled.std(), rel=1e-3)
