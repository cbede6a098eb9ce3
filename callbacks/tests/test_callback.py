"""The callback in a Trainer: what it does, and that it does nothing else."""

from __future__ import annotations

import copy
import json
import random
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from scale_equalization import (
    NoFusionError,
    ScaleEqualizationCallback,
    ScaleEqualizationError,
    measure_scales,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset


def test_fit_folds_every_fusion_before_the_first_step(make_lit, loader, fit):
    lit, initial = make_lit(), make_lit()
    callback = ScaleEqualizationCallback()
    fit(lit, loader(), callback, max_steps=0, max_epochs=1)
    for row in callback.report.rows:
        new = lit.get_parameter(f"{row['fusion']}.weight")[:, row["start"] : row["stop"]]
        old = initial.get_parameter(f"{row['fusion']}.weight")
        expected = old[:, row["start"] : row["stop"]] * row["scale"]
        assert torch.allclose(new, expected, rtol=1e-6)
    assert {row["fusion"] for row in callback.report.rows} == {"network.inner", "network.outer"}


class Snapshot(L.Callback):
    """What a run has used up and produced at its end."""

    def on_train_end(self, trainer, pl_module):
        self.state = {
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "torch": torch.get_rng_state().tolist(),
            "flags": [module.training for module in pl_module.modules()],
            "seen": pl_module.seen,
            "optimizer": str(trainer.optimizers[0].state_dict()),
            "workers": trainer.train_dataloader.num_workers,
        }


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (0, {}),
        (1, {"persistent_workers": True}),
        (0, {"precision": "bf16-mixed"}),
        (0, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    ],
    ids=["plain", "workers", "bf16", "accumulation"],
)
def test_off_is_bit_identical_to_no_callback(make_lit, loader, fit, same, workers, options):
    loads = {k: v for k, v in options.items() if k == "persistent_workers"}
    options = {k: v for k, v in options.items() if k not in loads}
    results = []
    for callbacks in ([], [ScaleEqualizationCallback(mode="off", verbose=False)]):
        lit, snapshot = make_lit(), Snapshot()
        lit.network.inner_bn.eval()
        fit(lit, loader(workers, **loads), *callbacks, snapshot, max_steps=20, **options)
        results.append((lit, snapshot.state))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_equalized_run_sees_the_data_of_the_control(make_lit, loader, fit, mode):
    control, lit = make_lit(), make_lit()
    fit(control, loader(), ScaleEqualizationCallback(mode="off"))
    fit(lit, loader(), ScaleEqualizationCallback(mode=mode))
    assert lit.seen == control.seen


def test_strategy_that_restores_late_is_refused(make_lit):
    trainer = SimpleNamespace(strategy=SimpleNamespace(restore_checkpoint_after_setup=True))
    with pytest.raises(ScaleEqualizationError, match=r"initial checkpoint on one device first"):
        ScaleEqualizationCallback().equalize(trainer, make_lit())


def test_works_in_a_pytorch_lightning_trainer(make_network, still, fit):
    pl = pytest.importorskip("pytorch_lightning")

    class Foreign(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = make_network()

        def forward(self, x):
            return self.network(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    lit, callback = Foreign(), ScaleEqualizationCallback()
    fit(lit, still, callback, trainer=pl.Trainer, max_epochs=1)
    assert callback.report.mode == "fold"


def test_compiled_network_is_looked_through(make_lit, still, fit):
    lit, callback = make_lit(), ScaleEqualizationCallback()
    lit.network = torch.compile(lit.network, backend="eager")
    fit(lit, still, callback, max_epochs=1)
    assert {row["fusion"] for row in callback.report.rows} == {"network.inner", "network.outer"}


def test_manual_optimization_and_several_optimizers(make_lit, still, fit):
    class Manual(type(make_lit())):
        def __init__(self, network):
            super().__init__(network)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            halves = list(self.network.parameters())
            return [torch.optim.SGD(half, lr=0.1) for half in (halves[:4], halves[4:])]

    callback = ScaleEqualizationCallback()
    fit(Manual(make_lit().network), still, callback, max_epochs=1)
    assert len(callback.report.rows) == 4


def test_model_made_in_configure_model_is_found(make_lit, make_network, still, fit):
    lit, callback = make_lit(), ScaleEqualizationCallback()
    lit.network = None

    def configure_model():
        lit.network = lit.network or make_network()

    lit.configure_model = configure_model
    fit(lit, still, callback, max_epochs=1)
    assert len(callback.report.rows) == 4


def test_device_augmentation_is_part_of_the_measurement(make_lit, still, fit):
    plain, lit = ScaleEqualizationCallback(tolerance=0), make_lit()
    fit(make_lit(), still, plain, max_steps=0, max_epochs=1)
    lit.on_after_batch_transfer = lambda batch, dataloader_idx: (batch[0] * 2, batch[1])
    scaled = ScaleEqualizationCallback(tolerance=0)
    fit(lit, still, scaled, max_steps=0, max_epochs=1)
    assert scaled.report.rows[0]["std"] > 1.5 * plain.report.rows[0]["std"]


def test_iterable_data_set_is_read_from_a_fresh_stream(make_lit, loader, fit):
    class Stream(IterableDataset):
        def __iter__(self):
            data = loader().dataset
            return iter([(data.images[i], data.labels[i]) for i in range(24)])

    control, lit = make_lit(), make_lit()
    fit(control, DataLoader(Stream(), batch_size=4))
    callback = ScaleEqualizationCallback(max_batches=4, tolerance=0)
    fit(lit, DataLoader(Stream(), batch_size=4), callback)
    assert lit.seen == control.seen
    assert callback.report.batches == 4


def test_first_of_several_loaders_counts(make_lit, loader, fit):
    lit, callback = make_lit(), ScaleEqualizationCallback()
    lit.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(
        lit(batch["a"][0]), batch["a"][1]
    )
    fit(lit, {"a": loader(), "b": loader()}, callback, max_epochs=1)
    assert len(callback.report.rows) == 4


def test_fast_dev_run_measures_one_batch(make_lit, loader, fit, tmp_path):
    callback = ScaleEqualizationCallback()
    fit(make_lit(), loader(), callback, fast_dev_run=True)
    assert callback.report.batches == 1
    assert not list(tmp_path.rglob("*.json"))


def test_overfit_batches_measures_those_batches(make_lit, still, fit):
    callback, lit = ScaleEqualizationCallback(tolerance=0), make_lit()
    fit(lit, still, callback, overfit_batches=2, max_steps=0, max_epochs=1)
    assert callback.report.batches == 2
    images = [still.dataset.images[:4], still.dataset.images[4:8]]
    expected = measure_scales(make_lit(), images, tolerance=0)
    assert callback.report.rows[0]["std"] == pytest.approx(expected.rows[0]["std"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:The `batch_idx` argument")
def test_report_is_saved_logged_and_printed(make_lit, loader, fit, tmp_path, caplog):
    callback = ScaleEqualizationCallback()
    logger = CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        fit(make_lit(), loader(), callback, logger=logger, max_epochs=1)
    saved = json.loads((tmp_path / "lightning_logs/version_0/scale_equalization.json").read_text())
    assert saved["rows"][3]["scale"] == callback.report.rows[3]["scale"]
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert "scale_equalization/network.outer/1/std" in header
    assert any("network.outer" in message for message in caplog.messages)


def test_batch_of_another_form_can_be_run_in_three_ways(make_lit, loader, fit):
    def collate(samples):
        images, labels = zip(*samples, strict=True)
        return {"picture": torch.stack(images), "truth": torch.stack(labels)}

    def lit():
        made = make_lit()
        made.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(
            made(batch["picture"]), batch["truth"]
        )
        return made

    data = {"collate_fn": collate}
    with pytest.raises(ScaleEqualizationError, match=r"keys \['picture', 'truth'\]"):
        fit(lit(), loader(**data), ScaleEqualizationCallback(), max_epochs=1)
    first = ScaleEqualizationCallback(batch_to_input=lambda batch: batch["picture"])
    fit(lit(), loader(**data), first, max_epochs=1)
    second, with_method = ScaleEqualizationCallback(), lit()
    with_method.scale_equalization_input = lambda batch: batch["picture"]
    fit(with_method, loader(**data), second, max_epochs=1)
    third = ScaleEqualizationCallback(forward=lambda module, batch: module(batch["picture"]))
    fit(lit(), loader(**data), third, max_epochs=1)
    assert first.report.rows == second.report.rows == third.report.rows


def test_module_without_fusion_says_so(fit, loader):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(NoFusionError, match="no concatenation was seen"):
        fit(Plain(), loader(), ScaleEqualizationCallback())


def test_state_is_plain_values_and_tensors(make_lit, loader, fit, tmp_path):
    callback = ScaleEqualizationCallback(mode="reparametrize")
    assert callback.state_dict() == {}
    lit = make_lit()
    fit(lit, loader(), callback, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert stored["ScaleEqualizationCallback"]["mode"] == "reparametrize"
    assert copy.deepcopy(stored)
