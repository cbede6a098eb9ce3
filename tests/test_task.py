"""SegmentationTask through a real Trainer, on a network of two layers and random images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from seglab.inference import Inference
from seglab.losses import CrossEntropy
from seglab.models.segmenter import Network
from seglab.optim import NoDecay, WarmupPolyLR
from seglab.task import SegmentationTask

K = 3
N_TRAIN, N_VAL = 10, 3


class Net(Network):
    """Logits at half resolution, and two auxiliary ones at a quarter."""

    def __init__(self, num_classes: int = K) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.main = nn.Conv2d(3, num_classes, 2, stride=2)
        self.auxiliary = nn.ModuleList(nn.Conv2d(3, num_classes, 4, stride=4) for _ in range(2))
        self.norm = nn.BatchNorm2d(num_classes)
        self.seen_dtypes: list[torch.dtype] = []

    def decode(self, image: Tensor) -> tuple[Tensor, ...]:
        x = image.float() / 255
        main = self.norm(self.main(x))
        self.seen_dtypes.append(self.main(x).dtype)
        return (main, *(head(x) for head in self.auxiliary)) if self.training else (main,)

    def forward(self, image: Tensor) -> Tensor:
        logits = self.decode(image)[0]
        return F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)


def sample(index: int, mask_size: tuple[int, int] = (8, 12)) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    image = rng.integers(0, 256, (3, 8, 12), dtype=np.uint8)
    mask = rng.choice([0, 1, 2, 255], mask_size).astype(np.uint8)
    return {"image": torch.from_numpy(image), "mask": torch.from_numpy(mask), "name": f"n{index}"}


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader([sample(i) for i in range(N_TRAIN)], batch_size=2)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([sample(100 + i, (20, 18)) for i in range(N_VAL)], batch_size=1)

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_trainer(tmp_path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False}
    settings = {**quiet, **defaults, "num_sanity_val_steps": 0, **options}
    return Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **settings)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.01)


def test_training_loss_adds_weighted_auxiliary_losses_at_label_size() -> None:
    network = Net()
    task = SegmentationTask(network, K, loss=nn.CrossEntropyLoss(ignore_index=255))
    task.log = task.log_dict = lambda *args, **kwargs: None
    batch = next(iter(Data().train_dataloader()))
    network.norm.momentum = 0.0
    losses = [
        F.cross_entropy(
            F.interpolate(logits, size=(8, 12), mode="bilinear", align_corners=False),
            batch["mask"].long(),
            ignore_index=255,
        )
        for logits in network.decode(batch["image"])
    ]
    expected = losses[0] + 0.4 * (losses[1] + losses[2])
    torch.testing.assert_close(task.training_step(batch, 0), expected)


def test_losses_are_logged_by_part(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, limit_val_batches=0)
    trainer.fit(SegmentationTask(Net(), K, auxiliary_weight=0.5), datamodule=Data())
    logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
    parts = logged["train/loss_decode"] + 0.5 * logged["train/loss_aux"]
    assert logged["train/loss"] == pytest.approx(parts)


def evaluate(task: SegmentationTask) -> np.ndarray:
    """IoU by plain numpy of predictions made at the label's own size."""
    hits, unions = np.zeros(K), np.zeros(K)
    for item in (sample(100 + i, (20, 18)) for i in range(N_VAL)):
        with torch.no_grad():
            logits = task(item["image"][None])
        logits = F.interpolate(logits, size=(20, 18), mode="bilinear", align_corners=False)
        found, label = logits.argmax(1)[0].numpy(), item["mask"].numpy()
        for c in range(K):
            p, t = (found == c) & (label != 255), label == c
            hits[c] += (p & t).sum()
            unions[c] += (p | t).sum()
    return hits / unions


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_equals_numpy_at_the_labels_own_size(tmp_path: Path, stage: str) -> None:
    task = SegmentationTask(Net(), K, class_names=["sky", "tree", "road"])
    trainer = make_trainer(tmp_path)
    run = trainer.validate if stage == "val" else trainer.test
    (logged,) = run(task, datamodule=Data(), verbose=False)
    iou = evaluate(task.eval())
    assert logged[f"{stage}/mIoU"] == pytest.approx(iou.mean(), abs=1e-6)
    for name, value in zip(("sky", "tree", "road"), iou, strict=True):
        assert logged[f"{stage}/IoU/{name}"] == pytest.approx(value, abs=1e-6)
    assert set(logged) >= {f"{stage}/{key}" for key in ("loss", "mAcc", "aAcc", "mDice")}


def test_each_validation_counts_anew(tmp_path: Path) -> None:
    task = SegmentationTask(Net(), K)
    make_trainer(tmp_path, max_epochs=2).fit(task, datamodule=Data())
    labelled = sum((sample(100 + i, (20, 18))["mask"] != 255).sum() for i in range(N_VAL))
    assert int(task.metrics["val"].confusion.sum()) == labelled


class Sets(LightningDataModule):
    """Five images, ever fewer pixels of which are labelled, in batches of a size."""

    def __init__(self, batch_size: int, first: int = 100) -> None:
        super().__init__()
        self.batch_size, self.first = batch_size, first

    def items(self) -> list[dict[str, Any]]:
        items = [sample(self.first + i, (20, 18)) for i in range(5)]
        for i, item in enumerate(items):
            item["mask"][: 4 * i] = 255
        return items

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.items(), self.batch_size)

    test_dataloader = val_dataloader = train_dataloader


def mean_of_images(task: SegmentationTask, data: Sets, non_ignore: bool) -> float:
    """Plain mean over images of each one's loss, through torch's own operations."""
    losses = []
    for item in data.items():
        with torch.no_grad():
            logits = task.network(item["image"][None])
        full = F.interpolate(logits, size=(20, 18), mode="bilinear", align_corners=False)
        target = item["mask"][None].long()
        total = F.cross_entropy(full, target, ignore_index=255, reduction="sum").item()
        losses.append(total / (int((target != 255).sum()) if non_ignore else target.numel()))
    return float(np.mean(losses))


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("non_ignore", [False, True])
@pytest.mark.parametrize(
    "inference", [Inference(), Inference(crop_size=(8, 8), stride=(6, 6))], ids=["whole", "windows"]
)
def test_loss_is_the_mean_over_images(
    tmp_path: Path, stage: str, non_ignore: bool, inference: Inference
) -> None:
    """Batches of 2, 2 and 1, and others: their mean would weigh the last image double."""
    loss = CrossEntropy(avg_non_ignore=non_ignore)
    task = SegmentationTask(Net(), K, loss=loss, inference=inference)
    trainer = make_trainer(tmp_path)
    run = trainer.validate if stage == "val" else trainer.test
    for batch_size in (1, 2, 3, 5):
        (logged,) = run(task, datamodule=Sets(batch_size), verbose=False)
        if inference.is_whole_image:
            expected = mean_of_images(task.eval(), Sets(1), non_ignore)
        elif batch_size == 1:
            expected = logged[f"{stage}/loss"]
        assert logged[f"{stage}/loss"] == pytest.approx(expected, rel=1e-6)


def test_loss_of_a_validation_forgets_the_one_before(tmp_path: Path) -> None:
    task, trainer = SegmentationTask(Net(), K), make_trainer(tmp_path)
    for first in (100, 200):
        data = Sets(2, first)
        (logged,) = trainer.validate(task, datamodule=data, verbose=False)
        expected = mean_of_images(task.eval(), data, non_ignore=False)
        assert logged["val/loss"] == pytest.approx(expected, rel=1e-6)


def test_each_validation_of_a_training_has_its_own_loss(tmp_path: Path) -> None:
    pairs: list[tuple[float, float]] = []

    class Watch(Callback):
        def on_validation_end(self, trainer: Trainer, task: Any) -> None:
            found = trainer.callback_metrics["val/loss"].item()
            pairs.append((found, mean_of_images(task, Sets(1), non_ignore=False)))

    task = SegmentationTask(Net(), K, optimizer=sgd)
    options = {"max_epochs": 3, "num_sanity_val_steps": 1}
    make_trainer(tmp_path, Watch(), **options).fit(task, datamodule=Sets(2))
    assert len({round(found, 4) for found, _ in pairs[1:]}) == 3  # the first is of two images only
    for found, expected in pairs[1:]:
        assert found == pytest.approx(expected, rel=1e-6)


def test_prediction_has_the_original_size(tmp_path: Path) -> None:
    predictions = make_trainer(tmp_path).predict(SegmentationTask(Net(), K), datamodule=Data())
    assert [p.shape for p in predictions] == [(1, 20, 18)] * N_VAL
    assert predictions[0].dtype == torch.uint8


def test_several_views_are_evaluated_without_a_loss(tmp_path: Path) -> None:
    task = SegmentationTask(Net(), K, inference=Inference(flip=True))
    (logged,) = make_trainer(tmp_path).validate(task, datamodule=Data(), verbose=False)
    assert "val/loss" not in logged
    assert "val/mIoU" in logged


@pytest.mark.parametrize(("precision", "dtype"), [("same", torch.bfloat16), ("32", torch.float32)])
def test_evaluation_precision_is_a_choice(
    tmp_path: Path, precision: Any, dtype: torch.dtype
) -> None:
    network = Net()
    task = SegmentationTask(network, K, eval_precision=precision)
    make_trainer(tmp_path, precision="bf16-mixed").validate(task, datamodule=Data(), verbose=False)
    assert set(network.seen_dtypes) == {dtype}


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, task: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 10),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 4),
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": 7, "max_epochs": 1}, 5),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 0.6}, 6),
        ({"max_epochs": 3, "overfit_batches": 2}, 6),
    ],
)
def test_schedule_ends_with_the_training(tmp_path: Path, options: dict, steps: int) -> None:
    rates = Rates()
    task = SegmentationTask(
        Net(), K, optimizer=sgd, scheduler=lambda o: WarmupPolyLR(o, eta_min=0.001)
    )
    make_trainer(tmp_path, rates, limit_val_batches=0, **options).fit(task, datamodule=Data())
    expected = [0.099 * (1 - t / (steps - 1)) + 0.001 for t in range(steps)]
    np.testing.assert_allclose(rates.seen, expected, rtol=1e-9)


def test_given_length_of_the_schedule_is_kept(tmp_path: Path) -> None:
    rates = Rates()
    task = SegmentationTask(
        Net(), K, optimizer=sgd, scheduler=lambda o: WarmupPolyLR(o, total_steps=11)
    )
    make_trainer(tmp_path, rates, max_steps=3).fit(task, datamodule=Data())
    np.testing.assert_allclose(rates.seen, [0.1, 0.09, 0.08])


def test_endless_training_refuses_a_schedule_without_end(tmp_path: Path) -> None:
    task = SegmentationTask(Net(), K, optimizer=sgd, scheduler=WarmupPolyLR)
    with pytest.raises(ValueError, match=r"training has none: set trainer\.max_steps"):
        make_trainer(tmp_path, max_epochs=-1).fit(task, datamodule=Data())


def test_parameter_rules_make_the_groups(tmp_path: Path) -> None:
    task = SegmentationTask(Net(), K, optimizer=sgd, parameter_rules=NoDecay(["norm"]))
    trainer = make_trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    trainer.fit(task, datamodule=Data())
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    assert groups["no_decay"]["weight_decay"] == 0.0
    assert groups["decay"]["weight_decay"] == 0.01
    assert len(groups["no_decay"]["params"]) == 2


def test_training_starts_from_given_weights(tmp_path: Path) -> None:
    start = Net()
    torch.save(start.state_dict(), tmp_path / "start.pt")
    task = SegmentationTask(Net(), K, weights=str(tmp_path / "start.pt"))
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, datamodule=Data())
    # One step of AdamW at 1e-3 moves no weight by more.
    assert (task.network.main.weight - start.main.weight).abs().max() < 2e-3


def test_restored_checkpoint_is_not_overwritten_by_initial_weights(tmp_path: Path) -> None:
    start, trained = Net(), Net()
    torch.save(start.state_dict(), tmp_path / "start.pt")
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(SegmentationTask(trained, K), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    task = SegmentationTask.load_from_checkpoint(
        tmp_path / "last.ckpt", network=Net(), num_classes=K, weights=str(tmp_path / "start.pt")
    )
    make_trainer(tmp_path).validate(task, datamodule=Data(), verbose=False)
    assert torch.equal(task.network.main.weight, trained.main.weight)


def test_checkpoint_built_in_python_holds_plain_data_only(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(SegmentationTask(Net(), K, optimizer=sgd), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    loaded = SegmentationTask.load_from_checkpoint(
        tmp_path / "last.ckpt", network=Net(), num_classes=K
    )
    assert torch.equal(loaded.network.main.weight, trainer.model.network.main.weight)


def test_checkpoint_of_other_classes_is_refused_in_one_sentence(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(SegmentationTask(Net(), K), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    other = SegmentationTask(Net(5), 5)
    with pytest.raises(ValueError, match="made for 3 classes, but the data has 5"):
        make_trainer(tmp_path).validate(other, datamodule=Data(), ckpt_path=tmp_path / "three.ckpt")


def test_network_and_data_must_agree_on_classes() -> None:
    with pytest.raises(ValueError, match="network has 3 classes, the data 4"):
        SegmentationTask(Net(), 4)


def test_label_outside_the_classes_stops_validation(tmp_path: Path) -> None:
    class BadData(Data):
        def val_dataloader(self) -> DataLoader:
            item = sample(0)
            item["mask"] = torch.full_like(item["mask"], 7)
            return DataLoader([item])

    task = SegmentationTask(Net(), K, inference=Inference(flip=True))
    with pytest.raises(ValueError, match="a label holds the value 7"):
        make_trainer(tmp_path).validate(task, datamodule=BadData(), verbose=False)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    task = SegmentationTask(Net(), K, optimizer=sgd)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=2, limit_val_batches=0)
    trainer.fit(task, datamodule=Data())
    assert trainer.global_step == N_TRAIN // 2 // 2  # whole steps
