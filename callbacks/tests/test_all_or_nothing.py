"""An error at any point leaves network, random streams and loader as they were, to the last bit.

The error is raised at every forward pass of a whole equalization in turn, hence in finding,
probing, settling, measuring, checking and proving; and inside the change itself.
"""

from __future__ import annotations

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scale_equalization import ScaleEqualizationCallback, ScaleEqualizationError, equalize_
from torch import nn
from torch.utils.data import DataLoader, RandomSampler


class Stop(BaseException):
    """As a KeyboardInterrupt, nobody may swallow it."""


class Levels(nn.Module):
    """Two concatenations one behind the other and a sum; frozen parts, hooks, buffers, a count."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fine = nn.Conv2d(3, 4, 3, padding=1)
            self.coarse = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.inner = nn.Conv2d(8, 4, 1)
            self.norm = nn.BatchNorm2d(4)
            self.outer = nn.Conv2d(8, 4, 1)
        self.fine.requires_grad_(False)
        self.drop = nn.Dropout2d(0.3).eval()
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.stop_at, self.error = 0, 0, Stop
        self.norm.register_forward_hook(lambda *_: None)

    def forward(self, x):
        self.seen += 1
        STARTED.append(1)
        if len(STARTED) == self.stop_at:
            raise self.error
        fine = self.fine(x)
        coarse = F.interpolate(5.0 * self.coarse(x), scale_factor=2.0)
        inner = self.norm(self.inner(torch.cat([fine, coarse], 1)))
        inner = inner + torch.randn_like(inner) * 1e-3 + coarse
        return self.drop(self.outer(torch.cat([inner, 0.1 * fine], 1)))


class Record(list):
    """A list that is not set back after measuring, as plain ones are."""


STARTED: list[int] = Record()  # forward passes; outside the network, whose attributes are set back


class Images(torch.utils.data.Dataset):
    """Draws from a stream of its own, counts, and may fail or be not finite at its last item."""

    def __init__(self, last=None) -> None:
        self.random, self.drawn, self.last = random.Random(0), 0, last

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index):
        self.drawn += 1
        if self.last is not None and self.drawn % 24 == 0:
            if self.last is Stop:
                raise Stop
            return torch.full((3, 8, 8), self.last)
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 8, 8, generator=generator) + self.random.random()


def make_loader(last=None):
    generator = torch.Generator().manual_seed(5)
    data = Images(last)
    return DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=generator))


def state(net, loader):
    """Everything that must not change, by value."""
    tensors = {name: values.clone() for name, values in net.state_dict().items()}
    tensors["torch"] = torch.get_rng_state()
    tensors["loader"] = loader.sampler.generator.get_state()
    plain = {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "data": (loader.dataset.random.getstate(), loader.dataset.drawn),
        "flags": [module.training for module in net.modules()],
        "trained": [parameter.requires_grad for parameter in net.parameters()],
        "classes": [type(module) for module in net.modules()],
        "attributes": [sorted(vars(module)) for module in net.modules()],
        "hooks": [len(module._forward_hooks) for module in net.modules()],
        "objects": [id(p) for p in net.parameters()],
        "gradients": [p.grad is None for p in net.parameters()],
    }
    return tensors, plain


def require_same(before, after) -> None:
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(values, after[0][name]) for name, values in before[0].items())


WAYS = {
    "fold": {},
    "reparametrize": {"mode": "reparametrize"},
    "center": {"center": True},
    "sums": {"sums": True},
    "placebo": {"placebo": True},
    "off": {"mode": "off"},
}


@pytest.mark.parametrize("way", WAYS)
def test_error_in_any_forward_pass_changes_nothing(way):
    STARTED.clear()
    equalize_(Levels(), make_loader(), tolerance=0, **WAYS[way])
    passes = len(STARTED)
    assert passes > 12
    for number in range(1, passes + 1):
        net, loader = Levels(), make_loader()
        net.stop_at = number
        before = state(net, loader)
        STARTED.clear()
        with pytest.raises(Stop):
            equalize_(net, loader, tolerance=0, **WAYS[way])
        require_same(before, state(net, loader))


@pytest.mark.parametrize("way", ["fold", "sums"])
def test_error_of_the_network_is_raised_or_does_not_matter(way):
    """A network may refuse two samples, or eval mode: then the finder takes what it can get."""
    STARTED.clear()
    whole = Levels()
    equalize_(whole, make_loader(), tolerance=0, **WAYS[way])
    for number in range(1, len(STARTED) + 1):
        net, loader = Levels(), make_loader()
        net.stop_at, net.error = number, RuntimeError
        before = state(net, loader)
        STARTED.clear()
        try:
            equalize_(net, loader, tolerance=0, **WAYS[way])
        except RuntimeError:
            require_same(before, state(net, loader))
        else:
            pairs = zip(net.parameters(), whole.parameters(), strict=True)
            assert all(torch.allclose(a, b, rtol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("last", [float("nan"), float("inf"), Stop])
def test_bad_last_batch_changes_nothing(way, last):
    net, loader = Levels(), make_loader(last)
    before = state(net, loader)
    with pytest.raises((ScaleEqualizationError, Stop)):
        equalize_(net, loader, tolerance=0, **WAYS[way])
    require_same(before, state(net, loader))


def test_error_while_reporting_progress_changes_nothing():
    def progress(done: int) -> None:
        if done == 3:
            raise Stop

    net, loader = Levels(), make_loader()
    before = state(net, loader)
    with pytest.raises(Stop):
        equalize_(net, loader, tolerance=0, progress=progress)
    require_same(before, state(net, loader))


class Stubborn(nn.Conv2d):
    """Cannot be marked; the first layer is changed by then, and so is its own weight."""

    def __setattr__(self, name, value):
        if name == "_scale_equalized":
            raise Stop
        super().__setattr__(name, value)


@pytest.mark.parametrize("way", ["fold", "reparametrize", "center", "sums", "placebo"])
def test_error_between_two_layers_changes_nothing(way):
    net, loader = Levels(), make_loader()
    net.outer.__class__ = Stubborn
    before = state(net, loader)
    with pytest.raises(Stop):
        equalize_(net, loader, tolerance=0, **WAYS[way])
    require_same(before, state(net, loader))


def test_failed_proof_changes_nothing():
    """The weight also acts through NumPy, which no mode sees, and only when it has changed."""
    net, loader = Levels(), make_loader()
    weight = net.outer.weight.detach().numpy()
    first = weight.sum()
    net.drop.register_forward_hook(lambda m, a, out: out + float(weight.sum() - first))
    before = state(net, loader)
    with pytest.raises(ScaleEqualizationError, match="acts elsewhere"):
        equalize_(net, loader, tolerance=0)
    require_same(before, state(net, loader))


def test_success_leaves_the_loader_where_it_was():
    net, loader = Levels(), make_loader()
    before = state(net, loader)
    equalize_(net, loader, tolerance=0)
    after = state(net, loader)
    changed = {name for name, old in before[0].items() if not torch.equal(old, after[0][name])}
    assert changed == {"inner.weight", "outer.weight"}
    same = before[1].keys() - {"attributes"}  # the marks
    assert all(before[1][name] == after[1][name] for name in same)


@pytest.mark.parametrize("number", [8, 20, -1])
def test_failed_fit_leaves_the_module_as_it_was(make_lit, still, fit, number):
    def forward(module, batch):
        STARTED.append(1)
        if len(STARTED) == stop_at:
            raise Stop
        return module(batch[0])

    stop_at = 0
    STARTED.clear()
    fit(make_lit(), still, ScaleEqualizationCallback(forward=forward, verbose=False), max_epochs=1)
    stop_at = number % len(STARTED) if number < 0 else number
    lit = make_lit()
    before = copy.deepcopy(lit.state_dict())
    STARTED.clear()
    with contextlib.suppress(Stop):
        fit(lit, still, ScaleEqualizationCallback(forward=forward, verbose=False), max_epochs=1)
        raise AssertionError("the error was swallowed")
    assert all(torch.equal(values, before[name]) for name, values in lit.state_dict().items())
    fresh = make_lit()
    for module in (lit, fresh):  # and trains as if nothing had happened
        fit(module, still, max_epochs=1)
    pairs = zip(lit.parameters(), fresh.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
