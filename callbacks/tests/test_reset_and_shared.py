"""Weights set back, runs that go on, names that mean nothing, shared layers."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from explicit_oracle import check, mentions
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from scale_equalization import (
    ScaleEqualizationCallback,
    ScaleEqualizationError,
    ScaleMonitor,
    equalize_,
    equivalent_param_groups,
)
from torch import nn
from toy_network import Toy, cat, conv, data, plain


class Lit(L.LightningModule):
    """A fusion with no normalization behind it."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fuse = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.fuse(torch.cat([x, 9 * x], 1))

    def training_step(self, batch, index):
        return (self(batch) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def on_train_start(self):
        self.start = self.fuse.weight.detach().clone()

    def ratio(self) -> float:
        weight = self.fuse.weight.detach()
        return float(weight[:, 3:].norm() / weight[:, :3].norm())


@pytest.fixture
def images():
    x = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(x, 2)


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
@pytest.mark.parametrize("callback", ["same", "new"])
@pytest.mark.parametrize("drawn", ["to the bit", "anew"])
def test_weights_set_back_are_equalized_again(fit, images, mode, callback, drawn):
    net, first = Lit(), ScaleEqualizationCallback(mode, verbose=False)
    initial = copy.deepcopy(net.state_dict())
    fit(net, images, first)
    once = net.ratio()
    if drawn == "anew":
        net.fuse.reset_parameters()
    else:
        net.load_state_dict(initial)
    second = first if callback == "same" else ScaleEqualizationCallback(mode, verbose=False)
    fit(net, images, second)
    assert second.report.fusions
    assert not second.report.refusals
    assert net.ratio() == pytest.approx(once, rel=1e-5 if drawn == "to the bit" else 0.7)
    assert net.ratio() < 0.3


@pytest.mark.parametrize("callback", ["same", "new"])
def test_weights_left_by_a_fit_are_not_touched(fit, images, callback):
    """Even where training has made the slices alike."""
    net, first = Lit(lr=0.1), ScaleEqualizationCallback(verbose=False)
    fit(net, images, first)
    with torch.no_grad():
        net.fuse.weight[:, 3:] = net.fuse.weight[:, :3]
    first.on_fit_end(None, net)
    left = net.fuse.weight.detach().clone()
    fit(net, images, first if callback == "same" else ScaleEqualizationCallback(verbose=False))
    assert torch.equal(net.start, left)


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_run_that_goes_on_without_a_norm_is_left_alone(fit, images, tmp_path, mode):
    net, path = Lit(lr=0.01), tmp_path / "last.ckpt"
    fit(net, images, max_epochs=1).save_checkpoint(path)
    resumed, callback = Lit(lr=0.01), ScaleEqualizationCallback(mode, verbose=False)
    fit(resumed, images, callback, ckpt_path=path, max_epochs=2)
    assert torch.equal(resumed.start, net.fuse.weight)
    assert mentions(callback.report, "goes on at step 8")


class MCDropoutUNet(Toy):
    """Named after dropout, which it is not; does more in training than in eval."""

    def forward(self, x):
        a, b = self.parts(x)
        y = self.fuse1(cat(a, b))
        return (y, self.aux(cat(a, y))) if self.training else y


def test_a_network_named_after_dropout_is_measured_in_training():
    report = equalize_(MCDropoutUNet(plain, aux=conv(seed=3)), data())
    assert {fusion.name for fusion in report.fusions} == {"fuse1", "aux"}


@pytest.mark.parametrize("size", [1, 3])
def test_center_leaves_the_mean_to_a_norm_without_bias(size):
    net = Toy(
        lambda net, a, b: net.norm(net.fuse1(cat(a + 1, b))),
        conv(size=size, bias=False),
        norm=nn.BatchNorm2d(4),
    )
    plain_fold, before = copy.deepcopy(net), copy.deepcopy(net)
    equalize_(plain_fold, data(), tolerance=0)
    report = equalize_(net, data(), tolerance=0, center=True)
    assert torch.equal(net.fuse1.weight, plain_fold.fuse1.weight)
    assert mentions(report, "norm removes them")
    check(before, plain_fold, report, data())


def test_refreshed_averages_are_no_stale_copies(fit, images):
    callback, average = ScaleEqualizationCallback("reparametrize"), EMAWeightAveraging()
    fit(Lit(), images, callback, average)
    assert not mentions(callback.report, "copy of")


def test_a_schedule_that_undoes_ratios_stops_the_fit(fit, images):
    net = Lit()
    report = equalize_(net, list(images))

    def configure():
        optimizer = torch.optim.SGD(equivalent_param_groups(net, report, "sgd", lr=0.01))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=99)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    net.configure_optimizers = configure
    with pytest.raises(ScaleEqualizationError, match="lr_factor"):
        fit(net, images, ScaleMonitor())


def test_monitor_pools_the_runs_of_a_shared_layer():
    class Shared(Lit):
        def forward(self, x):
            return [self.fuse(torch.cat([s * x, x], 1)) for s in (1.0, 100.0)]

    x = torch.randn(4, 3, 8, 8)
    values = ScaleMonitor().measure(Shared(), x)
    pooled = torch.stack([x, 100 * x])
    key = "scale_monitor/fuse/{}/{}".format
    assert values[key(0, "std")] == pytest.approx(float(pooled.std(correction=0)), rel=1e-5)
    assert values[key(1, "std")] == pytest.approx(float(x.std(correction=0)), rel=1e-5)
    assert values[key(0, "share")] > 0.9


class Rows(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def test_monitor_reads_gradients_when_their_optimizer_steps(fit, images):
    class Gan(Lit):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.judge, self.true = nn.Conv2d(4, 1, 1), []
            self.automatic_optimization = False

        def training_step(self, batch, index):
            first, second = self.optimizers()
            first.zero_grad()
            self.manual_backward(self.judge(self(batch).detach()).mean())
            first.step()
            second.zero_grad()
            self.manual_backward(10.0**index * self.judge(self(batch)).square().mean())
            self.true.append(float(self.fuse.weight.grad[:, :3].square().mean().sqrt()))
            second.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 1e-9) for part in (self.judge, self.fuse)]

    net, logger = Gan(), Rows()
    fit(net, images, ScaleMonitor(1), logger=logger)
    key = "scale_monitor/fuse/0/gradient"
    seen = [(step, metrics[key]) for step, metrics in logger.rows if key in metrics]
    assert [step for step, _ in seen] == [2 * i for i in range(len(net.true))]
    assert [value for _, value in seen] == pytest.approx(net.true, rel=1e-4)
