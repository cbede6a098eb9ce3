"""The explicit arm against a network that divides its branches in its own forward pass."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from scale_equalization import ScaleEqualizationCallback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from seglab.operators import FusionConv2d
from seglab.study.explicit import ExplicitEqualization


class Net(nn.Module):
    """A fine branch of small values beside a coarse one of large values; (N, 3, 8, 8) -> maps."""

    def __init__(self, takes_list: bool, stds: tuple[float, float] = (1.0, 1.0)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, 2, padding=1)
        kind = FusionConv2d if takes_list else nn.Conv2d
        self.fuse = kind(9, 6, 3, padding=1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(6), nn.Conv2d(6, 1, 1)
        self.takes_list, self.stds = takes_list, stds

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = 0.1 * self.fine(x) / self.stds[0], 5 * self.coarse(x) / self.stds[1]
        if self.takes_list:
            fused = self.fuse([fine, coarse])
        else:
            up = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
            fused = self.fuse(torch.cat([fine, up], 1))
        return self.last(self.norm(fused))


class Lit(L.LightningModule):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.net(batch) - batch.mean(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def train(net: Net, images: Tensor, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"max_epochs": 3, "accelerator": "cpu", "enable_checkpointing": False, **options}
    trainer = L.Trainer(**settings, callbacks=list(callbacks))
    trainer.fit(Lit(net), DataLoader(images, batch_size=4))
    return trainer


def equalizer(mode: str) -> ScaleEqualizationCallback:
    return ScaleEqualizationCallback(mode=mode, tolerance=0, exclude=(), verbose=False)


@pytest.mark.parametrize("takes_list", [False, True])
def test_explicit_arm_trains_as_a_network_that_divides(images: Tensor, takes_list: bool) -> None:
    net, off = Net(takes_list), equalizer("off")
    train(net, images, ExplicitEqualization(), off)
    stds = tuple(row["std"] for row in off.report.rows)
    assert stds[1] > 10 * stds[0]
    oracle = Net(takes_list, stds)
    train(oracle, images)
    with torch.no_grad():  # after the fit, the weights hold the division
        for channels, std in zip((slice(4), slice(4, 9)), stds, strict=True):
            oracle.fuse.weight[:, channels] /= std
    for ours, theirs in zip(net.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not net.fuse._forward_pre_hooks


def test_explicit_arm_trains_as_the_reparametrization(images: Tensor) -> None:
    explicit, other, plain = Net(True), Net(True), Net(True)
    train(explicit, images, equalizer("off"), ExplicitEqualization())
    train(other, images, equalizer("reparametrize"))
    train(plain, images)
    torch.testing.assert_close(explicit.fuse.weight, other.fuse.weight, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(plain.fuse.weight, other.fuse.weight, rtol=0.1)


@pytest.mark.parametrize("groups", [1, 3])
def test_checkpoint_holds_the_division(images: Tensor, tmp_path, groups: int) -> None:
    net, again = Net(False), Net(False)
    for each in (net, again):
        torch.manual_seed(3)
        each.fuse = nn.Conv2d(9, 6, 3, padding=1, bias=False, groups=groups).double()
    kept = {}

    class Look(L.Callback):
        def on_train_end(self, trainer: Any, lit: Any) -> None:
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            with torch.no_grad():
                kept["hooked"] = lit.net.eval()(images)

    train(net, images, equalizer("off"), ExplicitEqualization(), Look())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    Lit(again).load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), kept["hooked"], rtol=1e-9, atol=1e-12)


class Outputs(L.Callback):
    """What the network, hooks and all, says when training starts and ends."""

    def __init__(self, images: Tensor, path: Any = None) -> None:
        self.images, self.path = images, path

    def look(self, lit: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = lit.net.eval()(self.images)
        lit.net.train()
        return found

    def on_train_start(self, trainer: Any, lit: Any) -> None:
        self.first = self.look(lit)

    def on_train_end(self, trainer: Any, lit: Any) -> None:
        self.last = self.look(lit)
        if self.path:
            trainer.save_checkpoint(self.path)


def test_division_outlives_the_fit_once(images: Tensor, tmp_path) -> None:
    net, arm, before = Net(False), ExplicitEqualization(), Outputs(images, tmp_path / "a.ckpt")
    trainer = train(net, images, equalizer("off"), arm, before)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), before.last, rtol=1e-9, atol=1e-12)
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    one, two = (torch.load(tmp_path / f"{name}.ckpt")["state_dict"] for name in "ab")
    torch.testing.assert_close(one, two)

    for path in (tmp_path / "a.ckpt", tmp_path / "b.ckpt"):
        resumed, after = Net(False), Outputs(images)
        callbacks = [equalizer("off"), ExplicitEqualization(), after]
        trainer = L.Trainer(
            max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(Lit(resumed), DataLoader(images, batch_size=4), ckpt_path=path)
        torch.testing.assert_close(after.first, before.last, rtol=1e-9, atol=1e-12)


def test_explicit_arm_needs_scales_that_nobody_applied(images: Tensor) -> None:
    for callbacks in ((), (equalizer("fold"),)):
        with pytest.raises(ValueError, match="with mode off"):
            train(Net(False), images, *callbacks, ExplicitEqualization())


def test_layers_that_join_inside_are_refused(images: Tensor) -> None:
    class Joins(nn.Conv2d):
        def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
            up = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")
            return super().forward(torch.cat([fine, up], 1))

    net = Net(False)
    net.fuse = Joins(9, 6, 3, padding=1)
    net.forward = lambda x: net.last(net.norm(net.fuse(0.1 * net.fine(x), 5 * net.coarse(x))))
    with pytest.raises(ValueError, match=r"takes 9 channels, its input has \[4\]"):
        train(net, images, equalizer("off"), ExplicitEqualization())
