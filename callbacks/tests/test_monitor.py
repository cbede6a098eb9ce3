"""ScaleMonitor against explicit computations on a network with one fusion."""

from __future__ import annotations

import csv

import pytest
import torch
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
def test_monitor_logs_beside_the_callback_every_n_steps(make_lit, loader, fit, tmp_path):
    lit, plain = make_lit(), make_lit()
    monitor = ScaleMonitor(every_n_steps=4)
    options = {"max_steps": 9, "max_epochs": 1}
    logger = CSVLogger(tmp_path)
    fit(lit, loader(), ScaleEqualizationCallback(), monitor, logger=logger, **options)
    fit(plain, loader(), ScaleEqualizationCallback(), **options)
    text = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    for what in ("std", "share", "gradient"):
        logged = [row["step"] for row in rows if row[f"scale_monitor/network.outer/1/{what}"]]
        assert logged == ["0", "4", "8"]
    assert all(torch.equal(a, b) for a, b in zip(lit.parameters(), plain.parameters(), strict=True))


def test_bad_interval_and_networks_without_fusion_are_refused(x):
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        ScaleMonitor(every_n_steps=0)
    with pytest.raises(NoFusionError, match="no concatenation"):
        ScaleMonitor().measure(nn.Conv2d(3, 1, 1), x)
