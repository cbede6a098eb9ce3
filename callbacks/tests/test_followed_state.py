"""State in globals, classes, closures, slots, hooks and banks is as before after measuring."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from scale_equalization import ScaleEqualizationCallback, measure_scales
from torch import nn
from torch.utils.data import DataLoader, Dataset
from toy_network import Toy, data, plain
from training_runs import Task, Vectors, run_with, same_run

RNG = np.random.default_rng(0)
COUNT = 0


def helper():
    return RNG.normal()


def counting():
    global COUNT
    COUNT += 1
    return COUNT


def closure():
    n = 0

    def draw():
        nonlocal n
        n += 1
        return n

    return draw


class Slots:
    __slots__ = ("n", "values")

    def __init__(self) -> None:
        self.n, self.values = 0, torch.zeros(2)

    def __call__(self) -> float:
        self.n += 1
        self.values += 1
        return self.n + float(self.values.sum())


class Jitter:
    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __call__(self) -> float:
        return self.random.normal()


SHARED = Jitter()


def through_a_global_object():
    return SHARED()


class Own(Dataset):
    """Vectors to which `draw` adds."""

    shared = Jitter()
    calls = 0

    def __init__(self, kind: str) -> None:
        self.kind, self.items, self.slots, self.closure = kind, Vectors(), Slots(), closure()

    def __len__(self) -> int:
        return 32

    @staticmethod
    def static() -> float:
        return RNG.normal()

    @property
    def read(self) -> float:
        return RNG.normal()

    def draw(self) -> float:
        Own.calls += 1
        return {
            "helper": helper,
            "global count": counting,
            "global object": through_a_global_object,
            "class attribute": self.shared,
            "class count": lambda: Own.calls,
            "static method": self.static,
            "property": lambda: self.read,
            "closure": self.closure,
            "slots": self.slots,
        }[self.kind]()

    def __getitem__(self, index):
        return self.items[index] + 0.01 * float(self.draw())


KINDS = "helper,global count,global object,class attribute,class count,static method,property"


@pytest.mark.parametrize("kind", [*KINDS.split(","), "closure", "slots"])
def test_off_is_bit_identical_with_state_outside_objects(fit, kind):
    def train(*callbacks):
        global COUNT
        seed_everything(0)
        COUNT = Own.calls = 0
        for stream in (RNG, Own.shared.random, SHARED.random):
            stream.bit_generator.state = np.random.default_rng(0).bit_generator.state
        return run_with(fit, DataLoader(Own(kind), 4, shuffle=True), *callbacks)

    control = train()
    assert same_run(control, train())
    off = ScaleEqualizationCallback("off", verbose=False)
    assert same_run(control, train(off))
    assert off.report.batches > 1


def centring(net: nn.Module) -> dict[str, float]:
    state = {"mean": 0.0, "calls": 0}

    def hook(module, args):
        state["mean"] = 0.9 * state["mean"] + 0.1 * float(args[0].mean())
        state["calls"] += 1
        return (args[0] - state["mean"],)

    net.register_forward_pre_hook(hook)
    return state


def test_state_of_a_hook_is_as_before():
    net = Toy(plain)
    state = centring(net)
    measure_scales(net, data())
    assert state == {"mean": 0.0, "calls": 0}


@pytest.mark.parametrize("rows", [10, 100_000])
def test_a_memory_bank_is_as_before(rows):
    class Bank(Task):
        def __init__(self) -> None:
            super().__init__()
            self.bank = torch.zeros(rows, 4)

        def forward(self, x):
            self.bank[: len(x)] = x.detach()
            return self.network(x)

    net = Bank()
    measure_scales(net, [torch.randn(8, 4) for _ in range(3)])
    assert not net.bank.any()


class Hidden(Dataset):
    """Draws by a counter written in C, which nobody can set back."""

    def __init__(self) -> None:
        self.items, self.state = Vectors(), itertools.count()

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index):
        return self.items[index] + 0.01 * next(self.state)


@pytest.mark.parametrize("mode", ["off", "fold"])
def test_a_state_that_cannot_be_set_back_is_said(fit, mode):
    callback = ScaleEqualizationCallback(mode, verbose=False)
    run_with(fit, DataLoader(Hidden(), 4), callback)
    assert any("could not be set back" in note for note in callback.report.notes)


@pytest.mark.parametrize("kind", ["helper", "closure"])
def test_nothing_is_said_of_a_state_that_is_set_back(fit, kind):
    callback = ScaleEqualizationCallback("off", verbose=False)
    run_with(fit, DataLoader(Own(kind), 4, shuffle=True), callback)
    assert callback.report.notes == ()
