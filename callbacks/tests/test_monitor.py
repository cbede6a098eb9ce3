"""ScaleMonitor against explicit computations on a network with one fusion."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from scale_equalization import NoFusionError, ScaleEqualizationCallback, ScaleMonitor, equalize_
from torch import nn


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x):
        return self.fuse(torch.cat([x, 5 * x.flip(3)], dim=1))


@pytest.fixture
def x():
    return torch.randn(4, 3, 16, 16)


def test_std_and_share_equal_explicit_responses(x):
    network = One()
    values = ScaleMonitor().measure(network, x)
    weight = network.fuse.weight
    first = nn.functional.conv2d(x, weight[:, :3], padding=1).var(correction=0)
    second = nn.functional.conv2d(5 * x.flip(3), weight[:, 3:], padding=1).var(correction=0)
    key = "scale_monitor/fuse/{}/{}".format
    assert values[key(1, "std")] == pytest.approx(5 * x.std(correction=0).item(), rel=1e-5)
    assert values[key(0, "share")] == pytest.approx((first / (first + second)).item(), rel=1e-4)
    assert values[key(0, "share")] + values[key(1, "share")] == pytest.approx(1)


def test_gradients_follow_the_branch_scales(x):
    network, monitor = One(), ScaleMonitor()
    monitor.measure(network, x)
    network(x).square().mean().backward()
    gradients = monitor.gradients(network)
    key = "scale_monitor/fuse/{}/gradient".format
    expected = network.fuse.weight.grad[:, 3:].square().mean().sqrt().item()
    assert gradients[key(1)] == pytest.approx(expected, rel=1e-5)
    assert gradients[key(1)] > 3 * gradients[key(0)]  # Proposition 3.1: branch 1 is 5 x larger


def test_reparametrized_gradients_are_in_equilibrium(x):
    network, monitor = One(), ScaleMonitor()
    monitor.measure(network, x)
    equalize_(network, [x], mode="reparametrize")
    network(x).square().mean().backward()
    gradients = list(monitor.gradients(network).values())
    assert gradients[1] == pytest.approx(gradients[0], rel=0.5)


@pytest.mark.filterwarnings("ignore:The `batch_idx` argument")
@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_monitor_logs_beside_the_callback_every_n_steps(make_lit, loader, fit, tmp_path, mode):
    lit, plain = make_lit(), make_lit()
    monitor = ScaleMonitor(every_n_steps=4)
    options = {"max_steps": 9, "max_epochs": 1}
    logger = CSVLogger(tmp_path)
    fit(lit, loader(), ScaleEqualizationCallback(mode), monitor, logger=logger, **options)
    fit(plain, loader(), ScaleEqualizationCallback(mode), **options)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    for what in ("std", "share", "gradient", "update"):
        logged = [row["step"] for row in rows if row[f"scale_monitor/network.outer/1/{what}"]]
        assert logged == ["0", "4", "8"]
    assert all(torch.equal(a, b) for a, b in zip(lit.parameters(), plain.parameters(), strict=True))


class Steps(Callback):
    """Writes down the trained weight of a fusion around every optimizer step."""

    def __init__(self) -> None:
        self.before, self.after = [], []

    def trained(self, lit) -> torch.Tensor:
        return lit.network.outer._parameters["weight"].detach().double().clone()

    def on_before_optimizer_step(self, trainer, lit, optimizer) -> None:
        self.before.append(self.trained(lit))

    def on_train_batch_end(self, trainer, lit, *_) -> None:
        if len(self.before) > len(self.after):
            self.after.append(self.trained(lit))


@pytest.mark.parametrize("mode", ["off", "fold", "reparametrize"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_update_is_the_change_of_the_weight_in_use(
    make_lit, still, fit, tmp_path, mode, accumulated
):
    steps, callback, logger = Steps(), ScaleEqualizationCallback(mode), CSVLogger(tmp_path)
    monitor = ScaleMonitor(every_n_steps=2)
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulated, "logger": logger}
    fit(make_lit("adamw"), still, callback, monitor, steps, **options)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    found = {int(row["step"]): row for row in csv.DictReader(text.splitlines())}
    rows = [row for row in callback.report.rows if row["fusion"] == "network.outer"]
    n_measured = 0
    for step in range(0, len(steps.before), 2):
        for row in rows:
            # V * scale is what a reparametrized layer computes with; a constant cancels out.
            old, new = (w[step][:, row["start"] : row["stop"]] for w in (steps.before, steps.after))
            key = f"scale_monitor/network.outer/{row['branch']}/update"
            expected = float((new - old).norm() / old.norm())
            assert expected > 0
            assert float(found[step][key]) == pytest.approx(expected, rel=1e-4)
            n_measured += 1
    assert n_measured >= 4


def test_networks_without_fusion_are_passed_over_if_told(fit, still):
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.conv(x)

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(NoFusionError, match="no concatenation"):
        fit(Plain(), still, ScaleMonitor())
    monitor = ScaleMonitor(missing_ok=True)
    fit(Plain(), still, monitor)
    assert monitor.fusions == ()


def test_bad_interval_and_networks_without_fusion_are_refused(x):
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        ScaleMonitor(every_n_steps=0)
    with pytest.raises(NoFusionError, match="no concatenation"):
        ScaleMonitor().measure(nn.Conv2d(3, 1, 1), x)
