"""In Lightning: what training will draw is measured, and runs go on.

The oracles are numpy over the samples that the sampler can draw, and a run without the callback.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from explicit_oracle import mentions
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import CombinedLoader
from scale_equalization import ScaleEqualizationCallback, ScaleEqualizationError, ScaleMonitor
from torch.utils.data import (
    DataLoader,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from training_runs import (
    LOADERS,
    TAME,
    WILD,
    Sampler,
    Task,
    Vectors,
    run_with,
    same_run,
    slow_workers,
)

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
    replica = copied(callback)
    assert replica.report.rows == callback.report.rows
    run_with(fit, DataLoader(Vectors(), 4), replica, Task(seed=2))
    assert len(replica.report.rows) == 2


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
