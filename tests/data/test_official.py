"""ADE20K, VOC aug and Cityscapes on small copies of their official layouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch.nn.functional import cross_entropy

from seglab.data import (
    ADE20KDataModule,
    CityscapesDataModule,
    DataError,
    SegmentationDataModule,
    VOCAugDataModule,
)

OPTIONS: dict[str, Any] = {"num_workers": 0, "batch_size": 2, "crop_size": None, "eval_scale": None}


def masks(data: SegmentationDataModule, split: str = "train") -> dict[str, np.ndarray]:
    data.prepare()
    data.setup("fit")
    dataset = data.train_dataset if split == "train" else data.val_dataset
    return {
        sample["name"]: sample["mask"].numpy()
        for sample in (dataset[index] for index in range(len(dataset)))
    }


def stored(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.array(file)


def test_ade20k_drops_label_zero(ade20k_root: Path) -> None:
    found = masks(ADE20KDataModule(str(ade20k_root), **OPTIONS))
    assert list(found) == [f"ADE_train_{n:08d}" for n in range(1, 6)]
    for name, mask in found.items():
        raw = stored(ade20k_root / f"ADEChallengeData2016/annotations/training/{name}.png")
        assert (mask == np.where(raw == 0, 255, raw.astype(int) - 1)).all()


def test_ade20k_root_may_be_the_folder_itself(ade20k_root: Path) -> None:
    inner = ADE20KDataModule(str(ade20k_root / "ADEChallengeData2016"), **OPTIONS)
    assert len(masks(inner, "val")) == 3


@pytest.mark.parametrize("prepared", [False, True])
def test_voc_prefers_its_own_labels(voc_root: Path, prepared: bool) -> None:
    from scipy.io import loadmat

    data = VOCAugDataModule(str(voc_root), **OPTIONS)
    if prepared:
        data.prepare()
        data.prepare()  # a second time changes nothing
    data.setup("fit")
    names = [data.train_dataset[index]["name"] for index in range(len(data.train_dataset))]
    # the lists of the two, together, without VOC's validation images
    assert names == ["2007_000032", "2007_000039", "2008_000002", "2008_000003"]
    for index, name in enumerate(names):
        if name.startswith("2007"):
            raw = stored(voc_root / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png")
        else:
            record = loadmat(voc_root / f"benchmark_RELEASE/dataset/cls/{name}.mat")["GTcls"]
            raw = record[0]["Segmentation"][0]
        assert (data.train_dataset[index]["mask"].numpy() == raw).all()


def test_voc_pads_with_black(voc_root: Path) -> None:
    data = VOCAugDataModule(str(voc_root), **(OPTIONS | {"crop_size": (600, 600)}), scale=(40, 30))
    data.setup("fit")
    sample = data.train_dataset[0]
    outside = sample["mask"][-1] == 255
    assert outside.all()
    assert not sample["image"][:, -1].any()


def test_cityscapes_maps_ids_while_reading(cityscapes_root: Path) -> None:
    found = masks(CityscapesDataModule(str(cityscapes_root), **OPTIONS))
    assert sorted(found) == [f"{c}_000000_{f:06d}" for c in ("aachen", "ulm") for f in (19, 20)]
    kept = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    table = np.array([kept.index(raw) if raw in kept else 255 for raw in range(34)])
    folder = cityscapes_root / "gtFine/train"
    raw = stored(folder / "aachen/aachen_000000_000019_gtFine_labelIds.png")
    assert (found["aachen_000000_000019"] == table[raw]).all()
    raw = stored(folder / "ulm/ulm_000000_000020_gtFine_labelTrainIds.png")
    assert (found["ulm_000000_000020"] == raw).all()


def test_test_split_is_validation(cityscapes_root: Path) -> None:
    data = CityscapesDataModule(str(cityscapes_root), **OPTIONS)
    data.setup("test")
    assert [batch["name"] for batch in data.test_dataloader()] == [
        ["munster_000000_000019"],
        ["munster_000000_000020"],
    ]


def test_evaluation_makes_the_short_side_512(ade20k_root: Path) -> None:
    data = ADE20KDataModule(str(ade20k_root), num_workers=0)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape[2:] == (512, round(56 * 512 / 41))
    assert batch["mask"].shape[1:] == (41, 56)


MODULES = {
    "ade20k_root": (ADE20KDataModule, "ADEChallengeData2016/images"),
    "voc_root": (VOCAugDataModule, "VOCdevkit/VOC2012/JPEGImages"),
    "cityscapes_root": (CityscapesDataModule, "leftImg8bit"),
}
BROKEN_MASK = {
    "ade20k_root": "ADEChallengeData2016/annotations/training/ADE_train_00000001.png",
    "voc_root": "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png",
    "cityscapes_root": "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png",
}


@pytest.fixture(params=MODULES)
def layout(request: pytest.FixtureRequest) -> tuple[str, Path, type[Any], str]:
    root = request.getfixturevalue(request.param)
    return request.param, root, *MODULES[request.param]


Layout = tuple[str, Path, type[Any], str]


class Tiny(pl.LightningModule):
    """One convolution, by the batch contract."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, num_classes, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self.layer(batch["image"].float())
        return cross_entropy(logits, batch["mask"].long(), ignore_index=255)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert batch["mask"].ndim == 3

    def predict_step(self, batch: Any, batch_idx: int) -> list[str]:
        return list(batch["name"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-6)


def test_layouts_train_evaluate_and_predict(layout: Layout) -> None:
    _, root, module, folder = layout
    images = next(path for path in sorted((root / folder).rglob("*.*g"))).parent
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    options = {
        "root": str(root),
        "num_workers": 0,
        "batch_size": 2,
        "crop_size": [32, 32],
        "scale": [64, 32],
        "predict_folder": str(images),
    }
    config = parser.parse_object({"data": {"class_path": module.__name__, "init_args": options}})
    data = parser.instantiate(config).data
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", enable_model_summary=False, **quiet)
    model = Tiny(data.num_classes)
    trainer.fit(model, data)
    trainer.validate(model, data, verbose=False)
    names = [name for batch in trainer.predict(model, data) or [] for name in batch]
    assert sorted(names) == sorted(path.stem for path in images.iterdir())


def test_wrong_root_says_where_it_looked(layout: Layout) -> None:
    _, root, module, folder = layout
    (root / "other").mkdir()
    message = rf"looked for .*other/{folder} and .*; .*other holds nothing; set data.root"
    with pytest.raises(FileNotFoundError, match=message):
        module(str(root / "other"), **OPTIONS).setup("fit")


@pytest.mark.parametrize("part", ["images", "masks"])
def test_half_unpacked_archive(layout: Layout, part: str) -> None:
    key, root, module, folder = layout
    path = root / BROKEN_MASK[key]
    if part == "images":
        path = sorted((root / folder).rglob("*.*g"))[0]
    path.unlink()
    with pytest.raises(DataError, match=r"half unpacked: delete .* and unpack it again"):
        module(str(root), **OPTIONS).setup("fit")


Breaker = Callable[[Path], None]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def save_rgb(path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


def save_high_value(path: Path) -> None:
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(path)


@pytest.mark.parametrize(
    ("breaker", "message"),
    [
        (truncate, "cannot decode mask {}"),
        (save_rgb, "mask {} holds colours, not class ids"),
        (save_high_value, r"mask {} has value 200 \(16 pixels\); allowed are 0.*damaged"),
    ],
)
def test_broken_masks_are_named(layout: Layout, breaker: Breaker, message: str) -> None:
    key, root, module, _ = layout
    path = root / BROKEN_MASK[key]
    breaker(path)
    with pytest.raises(DataError, match=message.format(path.name).replace("mask ", "mask .*")):
        masks(module(str(root), **OPTIONS))


def test_truncated_images_are_named(layout: Layout) -> None:
    _, root, module, folder = layout
    for path in (root / folder).rglob("*.*g"):
        truncate(path)
    with pytest.raises(DataError, match=r"image .*g is cut short"):
        masks(module(str(root), **OPTIONS))


def test_broken_sbd_labels_are_named(voc_root: Path) -> None:
    path = voc_root / "benchmark_RELEASE/dataset/cls/2008_000002.mat"
    path.write_bytes(path.read_bytes()[:150])
    data = VOCAugDataModule(str(voc_root), **OPTIONS)
    data.setup("fit")
    with pytest.raises(DataError, match=r"cannot read SBD labels .*2008_000002.mat"):
        data.train_dataset[2]


def test_class_lists_have_the_official_lengths() -> None:
    for module, n_classes in (
        (ADE20KDataModule, 150),
        (VOCAugDataModule, 21),
        (CityscapesDataModule, 19),
    ):
        data = module("nowhere")
        assert data.num_classes == len(data.palette) == n_classes
