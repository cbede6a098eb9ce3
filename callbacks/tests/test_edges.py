"""What surrounds the equalization of a fit: modes, copies, pickles, logging, earlier training."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from scale_equalization import ScaleEqualizationCallback, ScaleMonitor, measure_scales
from scale_equalization.batches import run_network
from scale_equalization.copies import find_copies
from scale_equalization.framework_internals import (
    averaged_copies,
    clone_loader,
    gives_new_loaders,
    silent_logging,
    training_source,
)
from scale_equalization.state import calibrating
from torch import nn
from torch.utils.data import DataLoader


class Kept(nn.Module):
    """A normalization with statistics of its own, which training keeps in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean.fill_(0.0)
        self.norm.running_var.fill_(0.01)
        self.fuse = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.fuse(torch.cat([x, self.norm(x)], 1))


class KeptByTrain(Kept):
    """Says so itself, as MMSegmentation's `norm_eval` does."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.norm.eval()
        return self


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(8)]


def second_std(network, images) -> float:
    return measure_scales(network, images, tolerance=0).rows[1]["std"]


def test_norms_kept_in_eval_are_measured_in_eval(images):
    network = Kept()
    expected = (torch.stack(images) / (0.01 + network.norm.eps) ** 0.5).std(correction=0).item()
    assert second_std(network, images) == pytest.approx(1.0, abs=0.01)  # batch statistics
    network.norm.eval()
    assert second_std(network, images) == pytest.approx(expected, rel=1e-4)
    assert second_std(KeptByTrain().eval(), images) == pytest.approx(expected, rel=1e-4)
    assert second_std(Kept().eval(), images) == pytest.approx(1.0, abs=0.01)  # train() will come


def test_train_of_the_model_leaves_no_trace():
    network = KeptByTrain().eval()
    network.fuse.weight.requires_grad_(False)
    network.train = lambda mode=True: network.requires_grad_(True) and None
    with calibrating(network):
        assert network.fuse.weight.requires_grad
    assert not network.fuse.weight.requires_grad
    assert not network.training


class Lit(L.LightningModule):
    def __init__(self, network: nn.Module, teacher: bool = False) -> None:
        super().__init__()
        self.network = network
        self.teacher = copy.deepcopy(network).requires_grad_(False) if teacher else None

    def forward(self, x):
        self.log("brightness", x.mean(), prog_bar=True)
        self.log_dict({"contrast": x.std()})
        return self.network(x)

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), lr=0.1)


@pytest.fixture
def loader(images):
    return DataLoader(torch.cat(images), batch_size=4)


def test_fit_measures_norms_in_the_mode_they_have(fit, loader, images):
    for lit in (Lit(Kept()), Lit(Kept())):
        lit.network.norm.eval()
        callback = ScaleEqualizationCallback(tolerance=0)
        fit(lit, loader, callback, max_steps=0, max_epochs=1)
        expected = 1 / (0.01 + 1e-5) ** 0.5
        assert callback.report.rows[1]["std"] == pytest.approx(expected, rel=0.02)
        assert "1 normalization layers in eval mode (network.norm" in str(callback.report)
    whole = Lit(Kept()).eval()  # Lightning does not call train(): it will train like this
    fit(whole, loader, callback, max_steps=0, max_epochs=1)
    assert callback.report.rows[1]["std"] == pytest.approx(expected, rel=0.02)
    assert not whole.training


def test_logging_inside_forward_is_silent_while_measuring(fit, loader):
    lit = Lit(Kept())
    trainer = fit(lit, loader, ScaleEqualizationCallback(), ScaleMonitor(2), max_epochs=1)
    assert "brightness" in trainer.callback_metrics
    with silent_logging(lit):
        assert lit.log("x", 1.0) is None
    assert "log" not in vars(lit)


def test_mean_teacher_with_old_weights_is_named(fit, loader):
    lit, callback = Lit(Kept(), teacher=True), ScaleEqualizationCallback()
    fit(lit, loader, callback, max_steps=0, max_epochs=1)
    assert not torch.equal(lit.network.fuse.weight, lit.teacher.fuse.weight)
    assert "teacher.fuse.weight is a copy of network.fuse.weight and keeps the old values" in str(
        callback.report
    )
    off = ScaleEqualizationCallback(mode="off")
    fit(Lit(Kept(), teacher=True), loader, off, max_steps=0, max_epochs=1)
    assert "is a copy" not in str(off.report)


def test_shadow_of_another_callback_is_named(fit, loader):
    class Average(L.Callback):
        def setup(self, trainer, pl_module, stage):
            self.shadow = {k: v.detach().clone() for k, v in pl_module.named_parameters()}

    callback = ScaleEqualizationCallback()
    fit(Lit(Kept()), loader, Average(), callback, max_steps=0, max_epochs=1)
    assert "Average.shadow['network.fuse.weight'] is a copy" in str(callback.report)


def test_shared_weights_are_no_copies():
    network = nn.Module()
    network.a = nn.Conv2d(3, 3, 1)
    network.b = network.a
    network.c = copy.deepcopy(network.a)
    assert [name for name, _ in find_copies(network)["a.weight"]] == ["c.weight"]


def test_average_that_has_begun_is_left_and_named(fit, loader):
    class Begun(WeightAveraging):
        def setup(self, trainer, pl_module, stage):
            super().setup(trainer, pl_module, stage)
            self._average_model.n_averaged += 1

    lit, callback, average = Lit(Kept()), ScaleEqualizationCallback(), Begun()
    fit(lit, loader, average, callback, max_steps=0, max_epochs=1)
    assert "Begun has begun to average" in str(callback.report)
    assert next(iter(averaged_copies([average])))[2] is True


@pytest.mark.parametrize("mode", ["fold", "reparametrize", "off"])
def test_callbacks_pickle_after_fit(fit, loader, mode):
    callback, monitor = ScaleEqualizationCallback(mode=mode), ScaleMonitor(1)
    fit(Lit(Kept()), loader, callback, monitor, max_epochs=1)
    restored = pickle.loads(pickle.dumps(callback))
    assert restored.report == callback.report
    assert pickle.loads(pickle.dumps(monitor)).fusions == monitor.fusions


def test_state_of_one_fit_is_forgotten_in_the_next(fit, loader, tmp_path):
    callback = ScaleEqualizationCallback()
    path = tmp_path / "last.ckpt"
    fit(Lit(Kept()), loader, callback, max_epochs=1).save_checkpoint(path)
    fit(Lit(Kept()), loader, callback, ckpt_path=path, max_epochs=2)
    other = Lit(Kept())
    before = other.network.fuse.weight.clone()
    fit(other, loader, callback, max_steps=0, max_epochs=1)
    assert not torch.equal(other.network.fuse.weight, before)


def test_weights_said_to_be_equalized_are_left_alone(fit, loader):
    lit, callback = Lit(Kept()), ScaleEqualizationCallback()
    lit.scale_equalized = True
    before = lit.network.fuse.weight.clone()
    fit(lit, loader, callback, max_steps=0, max_epochs=1)
    assert torch.equal(lit.network.fuse.weight, before)
    assert "left alone: the weights come from a file that says" in str(callback.report)
    forced = ScaleEqualizationCallback(force=True)
    fit(lit, loader, forced, max_steps=0, max_epochs=1)
    assert not torch.equal(lit.network.fuse.weight, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "folded"}, "mode is 'folded'"),
        ({"center": True, "placebo": True}, "leave out center"),
        ({"preserve_norm": True, "placebo": True}, "exclude each other"),
        ({"sums": True, "mode": "reparametrize"}, 'use mode="fold"'),
        ({"max_batches": 0}, "max_batches is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"include": "decoder.*"}, "include is a text"),
        ({"exclude": "decoder.*"}, "exclude is a text"),
    ],
)
def test_conflicting_options_are_refused_at_construction(options, text):
    with pytest.raises(ValueError, match=text):
        ScaleEqualizationCallback(**options)


def test_error_names_what_a_batch_is_missing():
    with pytest.raises(RuntimeError, match=r"Module has no forward.*forward=lambda module, batch"):
        run_network(nn.Module(), torch.zeros(1))
    assert run_network(nn.Identity(), 3, lambda module, batch: module(batch) + 1) == 4


# -- private parts of the frameworks, against the installed versions ---------------------------


def test_clone_of_a_loader_is_one_of_its_own(loader):
    clone = clone_loader(loader, batch_sampler=[[3, 1]], generator=None)
    assert type(clone) is DataLoader
    assert [batch.shape[0] for batch in clone] == [2]
    assert len(list(loader)) == 8


def test_training_source_is_found_before_the_loop_is_set_up(fit, loader):
    seen = {}

    class Look(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            seen["source"] = training_source(trainer)
            seen["new"] = gives_new_loaders(trainer, seen["source"])

    class Own(Lit):
        def train_dataloader(self):
            return iter(loader)

    fit(Lit(Kept()), loader, Look(), max_steps=0, max_epochs=1)
    assert seen == {"source": loader, "new": False}
    fit(Own(Kept()), None, Look(), max_steps=0, max_epochs=1)
    assert seen["new"] is True


def test_every_batch_has_random_draws_of_its_own():
    class Latent(nn.Module):
        """Its second branch is one random number for a whole batch."""

        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.fuse(torch.cat([x, torch.randn(()).expand_as(x)], 1))

    net = Latent()
    before = torch.get_rng_state()
    expected = torch.stack([torch.randn(()) for _ in range(200)]).std(correction=0)
    torch.set_rng_state(before)
    images = [torch.ones(2, 3, 4, 4) * (-1) ** i for i in range(200)]
    report = measure_scales(net, images, tolerance=0)
    assert report.rows[1]["std"] == pytest.approx(expected.item(), rel=0.2)
    assert torch.equal(torch.get_rng_state(), before)


def test_module_made_by_the_first_forward_is_taken_back():
    class Late(nn.Module):
        def forward(self, x):
            if not hasattr(self, "layer"):
                self.layer = nn.Linear(3, 3)
                self.register_buffer("steps", torch.zeros(1))
            self.steps += 1
            return self.layer(x)

    network = Late()
    with calibrating(network):
        network(torch.zeros(1, 3))
    assert not list(network.state_dict())
    assert not hasattr(network, "layer")
