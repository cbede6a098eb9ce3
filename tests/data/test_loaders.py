"""The loaders of a data module: the same samples whatever loads them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from seglab.data import FolderDataModule, ScenesDataModule, SegmentationDataModule
from seglab.data.dataset import collate
from seglab.data.sampler import EndlessSampler

NAMES = ["a", "b", "c"]


def folder(root: Path, **options: Any) -> FolderDataModule:
    options = {
        "num_workers": 0,
        "batch_size": 2,
        "crop_size": (16, 16),
        "scale": (40, 24),
    } | options
    return FolderDataModule(str(root), NAMES, **options)


def hashes(batches: Iterable[Any]) -> list[str]:
    return [
        hashlib.sha1(image.numpy().tobytes() + mask.numpy().tobytes() + name.encode()).hexdigest()
        for batch in batches
        for image, mask, name in zip(*batch.values(), strict=True)
    ]


def train(data: SegmentationDataModule, n_epochs: int = 1) -> list[str]:
    data.setup("fit")
    loader = data.train_dataloader()
    collected = []
    for epoch in range(n_epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        collected += hashes(loader)
    return collected


def test_batches_keep_the_contract(folder_root: Path) -> None:
    data = folder(folder_root)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert batch["image"].dtype == batch["mask"].dtype == torch.uint8
        assert batch["image"].shape[:2] == (len(batch["name"]), 3)
        assert batch["mask"].shape == (len(batch["name"]), *batch["image"].shape[2:])
        assert all(isinstance(name, str) for name in batch["name"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes:UserWarning")
def test_first_200_samples_are_the_same_in_any_layout(folder_root: Path) -> None:
    """Workers, ranks and a resume in the middle: one order, one augmentation."""
    expected = train(folder(folder_root), n_epochs=50)
    assert len(set(expected)) == len(expected) == 200
    for n_workers in (1, 2, 8):
        assert train(folder(folder_root, num_workers=n_workers), n_epochs=50) == expected
    data = folder(folder_root)
    data.setup("fit")
    dataset = data.train_dataset
    ranks = [EndlessSampler(5, 1, num_replicas=2, rank=rank) for rank in range(2)]
    resumed = EndlessSampler(5, 2, n_batches_done=lambda: 33)
    for epoch in range(50):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        steps = [key for step in zip(*ranks, strict=True) for key in step]
        found = hashes(collate([dataset[key]]) for key in steps)
        assert found == expected[4 * epoch : 4 * epoch + 4]
    assert hashes(collate([dataset[key]]) for key in resumed) == expected[66:70]


def test_seed_changes_the_samples(folder_root: Path) -> None:
    assert train(folder(folder_root)) == train(folder(folder_root, seed=0))
    assert not set(train(folder(folder_root))) & set(train(folder(folder_root, seed=1)))


def test_loading_leaves_global_randomness_alone(folder_root: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(folder(folder_root))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


class Recorder(pl.LightningModule):
    """Trains one number and writes down what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen += hashes([batch])
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveEachStep(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(data: SegmentationDataModule, save_to: Path | None = None, resume: str = "") -> list[str]:
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[SaveEachStep(save_to)] if save_to else [],
    )
    trainer.fit(model, data, ckpt_path=resume or None)
    return model.seen


def few_scenes() -> ScenesDataModule:
    return ScenesDataModule(size=32, train_length=7, val_length=2, batch_size=2, num_workers=0)


def test_resume_continues_at_the_exact_sample(tmp_path: Path) -> None:
    whole = fit(few_scenes(), save_to=tmp_path)
    assert len(whole) == len(set(whole)) == 18  # three epochs of three steps
    for step in (1, 3, 5):  # mid-epoch, at an epoch's end, mid-epoch again
        resumed = fit(few_scenes(), resume=str(tmp_path / f"{step}.ckpt"))
        assert resumed == whole[2 * step :]


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled:UserWarning")
def test_overfitting_shows_the_same_batch_again() -> None:
    model = Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, overfit_batches=1, enable_model_summary=False, **quiet
    )
    trainer.fit(model, few_scenes())
    assert len(model.seen) == 6
    assert len(set(model.seen)) == 2


def evaluate(data: SegmentationDataModule) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    data.setup("validate")
    return {
        name: (image, mask)
        for batch in data.val_dataloader()
        for image, mask, name in zip(*batch.values(), strict=True)
    }


@pytest.mark.parametrize("eval_scale", [None, (48, 30)])
def test_batch_size_does_not_change_evaluation(
    folder_root: Path, eval_scale: tuple[int, int] | None
) -> None:
    single = evaluate(folder(folder_root, batch_size=1, eval_scale=eval_scale))
    many = evaluate(folder(folder_root, batch_size=8, eval_scale=eval_scale))
    assert sorted(single) == sorted(many) == [f"v{n}" for n in range(9)]
    for name, (image, mask) in single.items():
        assert torch.equal(many[name][0], image)
        assert torch.equal(many[name][1], mask)


def test_evaluation_resizes_images_only(folder_root: Path) -> None:
    image, mask = evaluate(folder(folder_root, eval_scale=(48, 30)))["v1"]
    assert image.shape == (3, 30, 40)
    assert mask.shape == (24, 32)


def test_predict_reads_a_folder_without_masks(folder_root: Path) -> None:
    data = folder(folder_root, predict_folder=str(folder_root / "val" / "images"))
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert sorted(name for batch in batches for name in batch["name"]) == [
        f"v{n}" for n in range(9)
    ]
    assert all((batch["mask"] == 255).all() for batch in batches)


def test_predict_names_hold_subfolders(folder_root: Path) -> None:
    data = folder(folder_root, predict_folder=str(folder_root))
    data.setup("predict")
    names = {data.predict_dataset[index]["name"] for index in range(len(data.predict_dataset))}
    assert {"train/images/t0", "val/masks/v8"} < names
    assert len(names) == 28


def test_missing_predict_folder(folder_root: Path) -> None:
    data = folder(folder_root, predict_folder=str(folder_root / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; set data.predict_folder"):
        data.setup("predict")


@pytest.mark.parametrize("option", ["batch_size", "num_workers", "seed"])
def test_negative_counts_are_refused(folder_root: Path, option: str) -> None:
    with pytest.raises(ValueError, match=rf"data.{option} is -1; it must be at least"):
        folder(folder_root, **{option: -1})


def test_names_and_colours_exist_before_setup(folder_root: Path) -> None:
    data = folder(folder_root)
    assert (data.num_classes, data.class_names, data.ignore_index) == (3, ("a", "b", "c"), 255)
    assert data.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
