"""In Lightning: what training will draw is measured, `mode="off"` leaves no trace, runs go on.

The oracles are numpy over the samples that the sampler can draw, and a run without the callback.
"""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from explicit_oracle import mentions, states_equal
from scale_equalization import ScaleEqualizationCallback, ScaleEqualizationError, ScaleMonitor
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)

L = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.loggers.logger import Logger  # noqa: E402
from lightning.pytorch.utilities import CombinedLoader  # noqa: E402


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


# -- calibrated on what training will draw -----------------------------------------------------


@pytest.mark.parametrize("kind", slow_workers(LOADERS))
def test_samples_of_the_users_sampler_are_measured(fit, kind):
    loader = LOADERS[kind]()
    callback = ScaleEqualizationCallback(tolerance=0, verbose=False)
    run_with(fit, loader, callback)
    expected = loader.dataset.std(range(TAME))
    assert callback.report.rows[0]["std"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", slow_workers(LOADERS))
def test_measuring_leaves_the_order_of_training(fit, kind):
    control = run_with(fit, LOADERS[kind]())
    watched = run_with(fit, LOADERS[kind](), ScaleEqualizationCallback("off", verbose=False))
    assert same_run(control, watched)


def test_samples_of_weight_zero_are_not_measured(fit):
    weights = [1.0] * TAME + [0.0] * (WILD - TAME)
    loader = DataLoader(Vectors(), 4, sampler=WeightedRandomSampler(weights, 256))
    callback = ScaleEqualizationCallback(tolerance=0, verbose=False)
    run_with(fit, loader, callback)
    assert callback.report.rows[0]["std"] == pytest.approx(Vectors().std(range(TAME)), rel=0.1)


def test_weights_of_samples_count_in_the_measure(fit):
    weights = [99.0] * TAME + [1.0] * (WILD - TAME)
    sampler = WeightedRandomSampler(weights, 16384)
    callback = ScaleEqualizationCallback(tolerance=0, verbose=False)
    run_with(fit, DataLoader(Vectors(), 256, sampler=sampler), callback)
    expected = Vectors().std(range(TAME, WILD)) * 0.1  # one sample in a hundred is wild
    assert callback.report.rows[0]["std"] == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("wrapped", [True, False])
def test_combined_loaders_are_measured_as_drawn(fit, wrapped):
    loaders = {
        "tame": DataLoader(Vectors(), 4, sampler=SubsetRandomSampler(range(TAME))),
        "all": DataLoader(Vectors(), 8, shuffle=True),
    }
    combined = CombinedLoader(loaders, "min_size") if wrapped else loaders
    callback = ScaleEqualizationCallback(
        tolerance=0, verbose=False, forward=lambda module, batch: module(batch["tame"])
    )
    run_with(fit, combined, callback, Task(key="tame"))
    assert callback.report.rows[0]["std"] == pytest.approx(Vectors().std(range(TAME)), rel=1e-5)


def test_loader_argument_replaces_the_training_loader(fit):
    own = DataLoader(Vectors(), 4, sampler=SubsetRandomSampler(range(TAME)))
    callback = ScaleEqualizationCallback(tolerance=0, verbose=False, loader=own)
    task = run_with(fit, DataLoader(Vectors(), 4, shuffle=True), callback)
    assert callback.report.rows[0]["std"] == pytest.approx(Vectors().std(range(TAME)), rel=1e-5)
    assert max(abs(x) for x in task.seen) > 1000.0


# -- mode="off" is bit-identical to no callback ------------------------------------------------


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


# -- trained and equalized networks go on ------------------------------------------------------


def loaded(task, tmp_path, fit, *callbacks):
    """A new task with the weights of a checkpoint of another one's training."""
    trainer = fit(task, DataLoader(Vectors(), 4), *callbacks, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    fresh = Task(seed=5)
    fresh.load_state_dict(torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"])
    return fresh


@pytest.mark.parametrize("first", ["trained", "fold", "reparametrize"])
@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_fine_tuning_goes_on_with_one_line(fit, tmp_path, first, mode):
    before = [] if first == "trained" else [ScaleEqualizationCallback(first, verbose=False)]
    fresh = loaded(Task(), tmp_path, fit, *before)
    control = run_with(fit, DataLoader(Vectors(), 4), task=copy.deepcopy(fresh))
    callback = ScaleEqualizationCallback(mode, verbose=False)
    tuned = run_with(fit, DataLoader(Vectors(), 4), callback, fresh)
    assert same_run(control, tuned)
    assert not callback.report.rows
    lines = [line for line in str(callback.report).splitlines() if mentions(line, "network.fuse1")]
    assert len(lines) == 1
    assert mentions(lines[0], "trained") or mentions(lines[0], "equalized")


def test_force_folds_what_was_trained(fit, tmp_path):
    fresh = loaded(Task(), tmp_path, fit)
    control = run_with(fit, DataLoader(Vectors(), 4), task=copy.deepcopy(fresh))
    callback = ScaleEqualizationCallback(force=True, verbose=False)
    tuned = run_with(fit, DataLoader(Vectors(), 4), callback, fresh)
    assert len(callback.report.rows) == 2
    assert not same_run(control, tuned)


# -- one callback, more than one run -----------------------------------------------------------


@pytest.mark.parametrize("mode", ["fold", "reparametrize", "off"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_callback_can_be_copied_after_fit(fit, mode, copied):
    callback = ScaleEqualizationCallback(mode, verbose=False)
    run_with(fit, DataLoader(Vectors(), 4), callback)
    twin = copied(callback)
    assert twin.report.rows == callback.report.rows
    run_with(fit, DataLoader(Vectors(), 4), twin, Task(seed=2))
    assert len(twin.report.rows) == 2


@pytest.mark.parametrize("mode", ["fold", "reparametrize", "off"])
def test_one_callback_serves_two_networks(fit, mode):
    shared = ScaleEqualizationCallback(mode, verbose=False)
    for seed, name in ((1, "fuse1"), (2, "fuse2")):
        single = ScaleEqualizationCallback(mode, verbose=False)
        expected = run_with(fit, DataLoader(Vectors(), 4), single, Task(seed, name))
        again = run_with(fit, DataLoader(Vectors(), 4), shared, Task(seed, name))
        assert same_run(expected, again)
        assert shared.report.rows == single.report.rows
        assert {row["fusion"] for row in shared.report.rows} == {f"network.{name}"}


def test_same_network_fitted_twice_is_equalized_once(fit):
    callback, task = ScaleEqualizationCallback(verbose=False), Task()
    run_with(fit, DataLoader(Vectors(), 4), callback, task)
    control = run_with(fit, DataLoader(Vectors(), 4), task=copy.deepcopy(task))
    run_with(fit, DataLoader(Vectors(), 4), callback, task)
    assert same_run(control, task)


CONFLICTS = [
    {"preserve_norm": True, "placebo": True},
    {"mode": "folded"},
    {"tolerance": -1.0},
    {"max_batches": 0},
]


@pytest.mark.parametrize("options", CONFLICTS, ids=str)
def test_conflicting_options_are_refused_at_construction(options):
    with pytest.raises((ValueError, ScaleEqualizationError), match=next(iter(options))):
        ScaleEqualizationCallback(**options)


class Memory(Logger):
    """Keeps the names of all metrics."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def log_metrics(self, metrics, step=None) -> None:
        self.names |= set(metrics)

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass


def test_one_monitor_serves_two_networks(fit):
    monitor = ScaleMonitor(every_n_steps=1)
    for seed, name in ((1, "fuse1"), (2, "fuse2")):
        memory = Memory()
        run_with(fit, DataLoader(Vectors(), 4), monitor, Task(seed, name), logger=memory)
        assert any(f"network.{name}" in metric for metric in memory.names)
        other = {"fuse1": "fuse2", "fuse2": "fuse1"}[name]
        assert not any(other in metric for metric in memory.names)


def test_monitor_takes_a_forward_of_model_and_batch(fit):
    memory = Memory()
    monitor = ScaleMonitor(every_n_steps=1, forward=lambda module, batch: module(batch["tame"]))
    loaders = {"tame": DataLoader(Vectors(), 4, sampler=Sampler())}
    run_with(fit, loaders, monitor, Task(key="tame"), logger=memory)
    assert any("network.fuse1" in metric for metric in memory.names)
