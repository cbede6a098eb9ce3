"""Running a network fast: layout, compilation, and steps during which the host does not wait."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

import seglab
from seglab import training_speed
from seglab.losses import CrossEntropy
from seglab.models import FusionConv2d, Segmenter, SmpNetwork, TimmEncoder
from seglab.models.heads import FCNHead, UPerHead
from seglab.models.segmenter import Network
from seglab.optim import WarmupPolyLR
from seglab.reporting.progress import LowOverheadProgressBar
from seglab.task import SegmentationTask
from seglab.training_speed import TrainingSpeed

K = 3
SYNCHRONIZING = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}


ADAMW, SGD = partial(torch.optim.AdamW, lr=1e-3), partial(torch.optim.SGD, lr=0.01)


def make_task(
    force: str | None = None, optimizer: Any = ADAMW, loss: CrossEntropy | None = None
) -> SegmentationTask:
    torch.manual_seed(0)
    encoder = TimmEncoder("test_resnet")
    network = Segmenter(
        encoder,
        partial(UPerHead, channels=8, dropout=0.0),
        partial(FCNHead, channels=8, dropout=0.0),
        K,
    )
    for module in network.modules():
        if isinstance(module, FusionConv2d) and module.groups == 1:
            module.force = force
    return SegmentationTask(network, K, loss, optimizer, WarmupPolyLR)


def batches(n: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    items = [
        {
            "image": torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator),
            "mask": torch.randint(0, K, (32, 32), generator=generator).to(torch.uint8),
            "name": str(index),
        }
        for index in range(2 * n)
    ]
    return DataLoader(items, batch_size=2)


def fit(
    task: SegmentationTask,
    path: Path,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    quiet = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"enable_progress_bar": False, "max_epochs": 1, **quiet, **options}
    trainer = Trainer(
        default_root_dir=path, accelerator="cpu", callbacks=list(callbacks), **settings
    )
    trainer.fit(task, batches(), ckpt_path=ckpt_path)
    return trainer


class Watch(Callback):
    """Profiles from the start of one batch to the start of a later one."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.seen: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Trainer, task: Any, batch: Any, index: int) -> None:
        if index == self.first:
            self.profiler = profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()
        if index == self.last:
            self.profiler.__exit__(None, None, None)
            self.seen = Counter(e.name for e in self.profiler.events() if not is_own(e))


READERS = {
    "aten::_fused_adamw_",
    "seglab::check_labels",
    "seglab::fuse",
    "seglab::fuse_backward",
    "seglab::upsampled_nll",
}
"""On the CPU these read their counters, labels, or whether their result is finite. On CUDA neither
AdamW's step nor the loss does, and convolutions are not fused unless that is forced."""


def is_own(event: Any) -> bool:
    """Whether an event is within an operator that may read on the CPU."""
    while event is not None and event.name not in READERS:
        event = event.cpu_parent
    return event is not None


@pytest.mark.parametrize(
    ("force", "precision", "loss"),
    [
        ("plain", "32-true", None),
        ("fused", "32-true", None),
        ("fused", "bf16-mixed", None),
        ("fused", "32-true", CrossEntropy(class_weight=[1, 2, 3])),
        ("fused", "32-true", CrossEntropy(avg_non_ignore=True, ohem_min_kept=9)),
        ("fused", "32-true", CrossEntropy(ohem_thresh=0.7, ohem_min_kept=9)),
    ],
)
def test_training_steps_wait_for_no_number(
    tmp_path: Path, force: str, precision: str, loss: CrossEntropy | None
) -> None:
    watch = Watch(first=2, last=6)
    bar = LowOverheadProgressBar(refresh_rate=100)
    fit(make_task(force, loss=loss), tmp_path, watch, bar, TrainingSpeed(), precision=precision,
        enable_progress_bar=True)  # fmt: skip
    assert watch.seen["aten::convolution"] > 0
    assert not SYNCHRONIZING & watch.seen.keys()


def test_the_watch_sees_a_step_that_waits(tmp_path: Path) -> None:
    class Waits(Callback):
        def on_train_batch_end(self, trainer: Trainer, task: Any, outputs: Any, *_: Any) -> None:
            outputs["loss"].item()

    watch = Watch(first=2, last=6)
    fit(make_task(), tmp_path, watch, Waits())
    assert watch.seen["aten::_local_scalar_dense"] == 4


def test_progress_bar_shows_the_loss_of_the_last_look(tmp_path: Path) -> None:
    class Shown(Callback):
        def __init__(self) -> None:
            self.shown: list[float] = []
            self.losses: list[float] = []

        def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, *_: Any) -> None:
            self.losses.append(outputs["loss"].item())
            self.shown.append(bar.get_metrics(trainer, task).get("train/loss"))

    bar, seen = LowOverheadProgressBar(refresh_rate=3), Shown()
    fit(make_task(), tmp_path, bar, seen, enable_progress_bar=True)
    looks = [index - index % 3 for index in range(8)]
    assert seen.shown[3:] == pytest.approx([seen.losses[look] for look in looks][3:])


def test_progress_bar_names_no_last_epoch_that_is_not_there(tmp_path: Path) -> None:
    bar = LowOverheadProgressBar()
    fit(make_task(), tmp_path, bar, enable_progress_bar=True)
    bar.trainer.fit_loop.max_epochs = -1
    assert bar._get_train_description(3) == "Epoch 3"
    bar.trainer.fit_loop.max_epochs = 9
    assert bar._get_train_description(3).startswith("Epoch 3/8")


def test_channels_last_trains_the_same_network(tmp_path: Path) -> None:
    plain, laid_out = make_task().double(), make_task().double()
    fit(plain, tmp_path)
    fit(laid_out, tmp_path, TrainingSpeed(channels_last=True))
    convolution = laid_out.network.decode_head.fpn_bottleneck.conv
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    expected = plain.state_dict()
    assert list(laid_out.state_dict()) == list(expected)
    for name, value in laid_out.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_layout_is_left_alone_on_the_cpu(tmp_path: Path) -> None:
    task = make_task()
    fit(task, tmp_path, TrainingSpeed())
    assert task.network.decode_head.fpn_bottleneck.conv.weight.is_contiguous()


def test_run_may_be_resumed_in_another_layout(tmp_path: Path) -> None:
    """A fused step on the CPU would take the moments' memory for that of the weights' layout."""
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = make_task().double(), make_task().double()
    options = {"max_epochs": 2, "enable_checkpointing": True}
    fit(whole, tmp_path, copy.deepcopy(saves), TrainingSpeed(channels_last=True), **options)
    fit(resumed, tmp_path, saves, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert resumed.network.decode_head.fpn_bottleneck.conv.weight.is_contiguous()
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_networks_with_fusion_layers_of_their_own_need_no_acceleration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_speed, "accelerate", partial(seglab.accelerate, force="fused"))
    task = make_task()
    network = type(task.network)
    with caplog.at_level("INFO"):
        fit(task, tmp_path, TrainingSpeed(accelerate=True), limit_train_batches=1)
    assert "nothing is left to gain" in caplog.text
    assert "decode_head.fpn_bottleneck.conv" in caplog.text
    assert type(task.network) is network


class OwnNetwork(Network):
    """A network of a user, with a fusion by torch's functions."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = K
        self.fuse = torch.nn.Conv2d(6, K, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = image.to(self.fuse.weight.dtype) / 255
        low = torch.nn.functional.avg_pool2d(image, 2)
        up = torch.nn.functional.interpolate(low, scale_factor=2, mode="bilinear")
        logits: torch.Tensor = self.fuse(torch.cat([image, up], dim=1))
        return logits

    def decode(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self(image),)


def own_task() -> SegmentationTask:
    torch.manual_seed(0)
    return SegmentationTask(OwnNetwork().double(), K, optimizer=SGD, scheduler=WarmupPolyLR)


def test_networks_of_ones_own_are_accelerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    everything = partial(seglab.accelerate, force="fused", min_gain=0, repeats=1)
    monkeypatch.setattr(training_speed, "accelerate", everything)
    with caplog.at_level("INFO"):
        fit(own_task(), tmp_path, TrainingSpeed(accelerate=True), limit_train_batches=1)
    assert "  fuse: 1 branches" in caplog.text


def test_refusal_of_another_rank_undoes_acceleration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    everything = partial(seglab.accelerate, force="fused", min_gain=0, repeats=1)
    monkeypatch.setattr(training_speed, "accelerate", everything)
    decisions: list[tuple[bool, bool]] = []

    def another_refused(_: Any, decision: bool, all: bool = True) -> bool:  # noqa: A002
        decisions.append((decision, all))
        return False

    monkeypatch.setattr(SingleDeviceStrategy, "reduce_boolean_decision", another_refused)
    task = own_task()
    seen: list[type] = []

    class See(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(type(task.network))

    with caplog.at_level("INFO"):
        fit(task, tmp_path, TrainingSpeed(accelerate=True), See(), limit_train_batches=1)
    assert decisions[0] == (True, True)
    assert seen == [OwnNetwork]
    assert "the trial of another rank refused it" in caplog.text


def smp_task() -> SegmentationTask:
    torch.manual_seed(0)
    network = SmpNetwork("Unet", "resnet18", K).double()
    return SegmentationTask(network, K, optimizer=SGD, scheduler=WarmupPolyLR)


def test_accelerated_training_gives_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    everything = partial(seglab.accelerate, force="fused", min_gain=0, repeats=1)
    monkeypatch.setattr(training_speed, "accelerate", everything)
    plain, faster = smp_task(), smp_task()
    # Two steps: batch normalization over two pixels blows rounding up a hundredfold in each.
    fit(plain, tmp_path, limit_train_batches=2)
    with caplog.at_level("INFO"):
        fit(faster, tmp_path, TrainingSpeed(accelerate=True), limit_train_batches=2)
    assert "accelerate: forward x" in caplog.text
    assert "model.decoder.blocks.0.conv1.0: 1 branches" in caplog.text
    assert type(faster.network) is SmpNetwork
    expected = plain.state_dict()
    for name, value in faster.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_refused_acceleration_is_reported_and_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, refused = smp_task(), smp_task()
    fit(plain, tmp_path)
    with caplog.at_level("INFO"):
        fit(refused, tmp_path, TrainingSpeed(accelerate=True))
    assert "accelerate: the network stays as it is" in caplog.text
    expected = plain.state_dict()
    for name, value in refused.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no effect in compiled code"):
        TrainingSpeed(compile=True, accelerate=True)
    task = make_task()
    task.network.encoder = TimmEncoder("test_resnet", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing do not go together"):
        fit(task, tmp_path, TrainingSpeed(compile=True))


@pytest.mark.slow
def test_compiled_training_gives_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain, compiled = make_task(optimizer=SGD).double(), make_task(optimizer=SGD).double()
    fit(plain, tmp_path, max_epochs=2)
    torch.compiler.reset()
    counters.clear()
    fit(compiled, tmp_path, TrainingSpeed(compile=True), max_epochs=2)
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    assert "torch.compile: " in caplog.text + capsys.readouterr().err
    assert "decode" not in compiled.network.__dict__
    expected = plain.state_dict()
    assert list(compiled.state_dict()) == list(expected)
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
