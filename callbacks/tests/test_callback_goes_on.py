"""A run that stops and goes on: resumed, fitted again, probed by finders, averaged."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from scale_equalization import (
    ScaleEqualizationCallback,
    ScaleEqualizationError,
)
from torch import nn


@pytest.mark.parametrize("mode", ["fold", "reparametrize", "off"])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_resumed_run_equals_one_that_never_stopped(
    make_lit, still, fit, same, tmp_path, mode, rule
):
    callbacks = [ScaleEqualizationCallback(mode=mode) for _ in range(2)]
    every_epoch = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    options = {"enable_checkpointing": True, "max_epochs": 3}
    whole, resumed, path = make_lit(rule), make_lit(rule), tmp_path / "epoch=0.ckpt"
    fit(whole, still, callbacks[0], every_epoch, **options)
    fit(resumed, still, callbacks[1], copy.deepcopy(every_epoch), ckpt_path=path, **options)
    assert same(whole, resumed)
    assert callbacks[1].report == callbacks[0].report


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_checkpoint_loads_strictly_into_the_bare_network(make_lit, still, fit, tmp_path, mode):
    lit = make_lit()
    saved = {}

    class Middle(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                pl_module.eval()
                with torch.no_grad():
                    saved["live"] = pl_module(still.dataset.images[:4])
                pl_module.train()

    fit(lit, still, ScaleEqualizationCallback(mode=mode), Middle())
    bare = make_lit()
    bare.load_state_dict(torch.load(tmp_path / "middle.ckpt")["state_dict"], strict=True)
    assert torch.equal(bare.eval()(still.dataset.images[:4]), saved["live"])
    assert type(lit.network.outer) is nn.Conv2d  # plain again after fit


def test_resume_in_another_mode_is_refused(make_lit, still, fit, tmp_path):
    path = tmp_path / "last.ckpt"
    fit(make_lit(), still, ScaleEqualizationCallback()).save_checkpoint(path)
    other = ScaleEqualizationCallback(mode="reparametrize")
    with pytest.raises(ScaleEqualizationError, match=r"mode='fold', this run has mode='repar"):
        fit(make_lit(), still, other, ckpt_path=path, max_epochs=4)


def test_resume_of_a_run_without_the_callback_equalizes_nothing(make_lit, still, fit, tmp_path):
    path = tmp_path / "last.ckpt"
    fit(make_lit(), still).save_checkpoint(path)
    callback = ScaleEqualizationCallback()
    fit(make_lit(), still, callback, ckpt_path=path, max_epochs=4)
    assert callback.report.fusions == ()
    assert "trained before" in str(callback.report)


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_second_fit_of_the_same_network_goes_on(make_lit, still, fit, mode):
    lit, callback = make_lit(), ScaleEqualizationCallback(mode=mode)
    fit(lit, still, callback, max_epochs=1)
    weight = lit.network.outer.weight.clone()
    fit(lit, still, callback, max_steps=0, max_epochs=1)
    assert torch.allclose(lit.network.outer.weight, weight, rtol=1e-5)


def test_same_callback_equalizes_a_second_network(make_lit, still, fit):
    callback = ScaleEqualizationCallback()
    fit(make_lit(), still, callback, max_epochs=1)
    other = make_lit(seed=3)
    before = other.network.outer.weight.clone()
    fit(other, still, callback, max_steps=0, max_epochs=1)
    assert not torch.equal(other.network.outer.weight, before)


def test_finders_do_not_cause_a_second_fold(make_lit, loader, fit):
    reference, lit = ScaleEqualizationCallback(), make_lit()
    fit(make_lit(), loader(), reference, max_steps=0, max_epochs=1)
    lit.lr = lit.batch_size = 4
    callback = ScaleEqualizationCallback()
    finder = LearningRateFinder(num_training_steps=5, update_attr=False)
    fit(lit, loader(), callback, finder, max_steps=0, max_epochs=1)
    scales = [row["scale"] for row in callback.report.rows]
    assert scales == pytest.approx([row["scale"] for row in reference.report.rows], rel=1e-6)
    initial = make_lit().network.outer.weight
    ratio = (lit.network.outer.weight / initial)[0, 0, 0, 0].item()
    assert ratio == pytest.approx(callback.report.rows[2]["scale"], rel=1e-5)


def test_batch_size_finder_runs_before_the_fold(make_lit, fit, loader):
    class Module(L.LightningDataModule):
        batch_size = 2

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

        def val_dataloader(self):
            return loader(shuffle=False)

    lit, callback = make_lit(), ScaleEqualizationCallback()
    finder = BatchSizeFinder(max_trials=1, steps_per_trial=1)
    fit(lit, Module(), finder, callback, max_steps=0, max_epochs=1)
    ratio = lit.network.outer.weight / make_lit().network.outer.weight
    assert ratio[0, 0, 0, 0].item() == pytest.approx(callback.report.rows[2]["scale"], rel=1e-5)


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_weight_average_starts_from_equalized_weights(make_lit, loader, still, fit, same, mode):
    lit = make_lit()
    average = WeightAveraging()
    early = {}

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            early["same"] = same(average._average_model.module, pl_module)

    fit(lit, loader(), average, ScaleEqualizationCallback(mode=mode), Look(), val=still)
    assert early["same"]


def test_weight_average_of_a_reparametrized_run_survives_a_resume(make_lit, still, fit, tmp_path):
    def callbacks():
        every_epoch = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        return WeightAveraging(), ScaleEqualizationCallback(mode="reparametrize"), every_epoch

    options = {"enable_checkpointing": True, "max_epochs": 3}
    resumed, whole, path = make_lit(), make_lit(), tmp_path / "epoch=0.ckpt"
    fit(whole, still, *callbacks(), **options)
    fit(resumed, still, *callbacks(), ckpt_path=path, **options)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_stochastic_weight_averaging_averages_equalized_weights(make_lit, still, fit, mode):
    class Record(L.Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights.append(pl_module.network.outer.weight.detach().clone())

    lit, record = make_lit(), Record()
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    fit(lit, still, average, record, ScaleEqualizationCallback(mode=mode), max_epochs=4)
    history = torch.stack(record.weights[:36])  # the fourth epoch only renews batch statistics
    weight = lit.network.outer.weight
    assert not any(torch.equal(weight, step) for step in history)
    assert (weight <= history.amax(0) + 1e-6).all()
    assert (weight >= history.amin(0) - 1e-6).all()  # no weight from before the fold is in it
