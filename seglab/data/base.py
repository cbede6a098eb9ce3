"""What all data modules share: loaders that are exact, resumable and the same on any rank."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from seglab.bounds import check_bounds
from seglab.data.dataset import SegmentationDataset, collate
from seglab.data.download import Progress, silent
from seglab.data.errors import DataError
from seglab.data.sampler import EndlessSampler, EqualShapeBatches, FirstSteps
from seglab.data.sources.cache import cache_files
from seglab.data.sources.files import FileSource, Item
from seglab.data.sources.grouping import ClassGroups, Grouped
from seglab.data.sources.labels import LabelTable
from seglab.data.sources.listing import find_images_below, require_folder
from seglab.data.sources.reading import ImageFormat
from seglab.data.sources.selecting import limit_source, repeat_rare_classes
from seglab.data.sources.source import IGNORE_INDEX, Source
from seglab.data.transforms.augment import Augment
from seglab.data.transforms.resized import Resized
from seglab.lightning_internals import count_all_batches
from seglab.palette import Color, make_palette
from seglab.seeds import global_seed

if TYPE_CHECKING:
    from albumentations import BaseCompose, BasicTransform


class Loader(DataLoader[Any]):
    """A DataLoader that Lightning takes for resumable, because it is.

    The position in the training order is read from the trainer's own progress (which a
    checkpoint restores), so there is no state to keep here.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""


class SegmentationDataModule(LightningDataModule):
    """Base of all data modules; a subclass says where the images are (`make_source`).

    Args:
        class_names: One name per class, in the order of the ids.
        palette: One RGB triple per class; PASCAL VOC's colour map when left out.
        batch_size: Images per training step on one device.
        eval_batch_size: Largest batch in evaluation (only images of equal shape are put
            together, so results do not depend on it); `batch_size` when left out.
        num_workers: Loader processes per device; 0 loads in the main process.
        seed: Of the training order and of every augmentation; a sample's augmentation depends
            on (seed, epoch, index) only. None: the one that `seed_everything` was given, else 0.
        crop_size: Height and width of training crops; None leaves images whole and as they are.
        scale: (long, short) box of the random resize at ratio 1; each image's own size if None.
        transforms: albumentations transforms for training, in this order, instead of the standard
            recipe (`seglab.data.transforms.standard_transforms` with `crop_size` and `scale`).
        eval_scale: (long, short) box in pixels that images are resized to fit in for evaluation,
            keeping their ratio; masks stay as they are. None: images keep their size.
        channels: Bands of the images; 3 is RGB.
        value_range: Raw values that become 0 and 255 for deep images, as [0, 65535] or [0, 1]; None
            for 8-bit files.
        drop_alpha: Leave out the alpha of images that are transparent somewhere.
        predict_folder: Folder of images for `predict`, subfolders included; a sample's name is
            its path in the folder without the suffix.
        class_groups: New class name to names of the classes it is made of; classes in no group
            are ignored. None: the classes as they are.
        limit: Train on a share in (0, 1], or on the names listed in a text file.
        repeat_rare: Repeat training images with classes that fewer than this share of the images
            have (`seglab.data.sources.selecting.repeat_rare_classes`).
        cache_folder: Keep decoded training files there (`seglab.data.sources.cache`).
        cache_gib: Bound of the cache in GiB.

    Raises:
        ValueError: If class names repeat, the palette's length differs or a count is negative.
        DataError: If a transform is not made for the images' bands or depth.
    """

    ignore_index = IGNORE_INDEX
    has_own_classes = False  # typed by a user: then one that never occurs is a mistake

    def __init__(
        self,
        class_names: Sequence[str],
        palette: Sequence[Color] | None = None,
        *,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 2,
        seed: int | None = None,
        crop_size: tuple[int, int] | None = None,
        scale: tuple[int, int] | None = None,
        transforms: "list[BasicTransform | BaseCompose] | None" = None,
        eval_scale: tuple[int, int] | None = None,
        channels: int = 3,
        value_range: tuple[float, float] | None = None,
        drop_alpha: bool = False,
        predict_folder: str | None = None,
        class_groups: dict[str, list[str]] | None = None,
        limit: float | str | None = None,
        repeat_rare: float | None = None,
        cache_folder: str | None = None,
        cache_gib: float = 32.0,
    ) -> None:
        super().__init__()
        self.seed = (global_seed() or 0) if seed is None else seed
        check_bounds(
            data__batch_size=batch_size,
            data__eval_batch_size=eval_batch_size,
            data__num_workers=num_workers,
            data__seed=self.seed,
            data__channels=channels,
            data__crop_size=crop_size,
            data__scale=scale,
            data__eval_scale=eval_scale,
            data__limit=limit,
            data__repeat_rare=repeat_rare,
            data__cache_gib=cache_gib,
        )
        _check_value_range(value_range)
        colors = palette or make_palette(len(class_names))
        self.class_names = tuple(class_names)
        self.palette = tuple((int(r), int(g), int(b)) for r, g, b in colors)
        _check_classes(self.class_names, self.palette)
        self.class_groups = ClassGroups(class_groups, class_names) if class_groups else None
        if self.class_groups:
            self.class_names = self.class_groups.names
            self.palette = tuple(self.palette[i] for i in self.class_groups.first_members)
        self.num_classes = len(self.class_names)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.crop_size = crop_size
        self.scale = scale
        self.transforms = transforms
        self.eval_scale = eval_scale
        self.channels = channels
        self.image_format = ImageFormat(channels, value_range, drop_alpha)
        if transforms:
            self._try_transforms(transforms)
        self.predict_folder = predict_folder
        self.limit = limit
        self.repeat_rare = repeat_rare
        self.cache_folder = cache_folder
        self.cache_gib = cache_gib

    @abstractmethod
    def make_source(self, split: str) -> Source:
        """Return the source of "train", "val" or "test"; here the files are looked up."""

    def check_source(self, source: Source) -> None:
        """Look once more at a split's files before the first one is used; quick checks only."""

    def default_transforms(self) -> "list[BasicTransform | BaseCompose]":
        """Return the training transforms used when the config names none."""
        if self.crop_size is None:
            return []
        from seglab.data.transforms import standard_transforms

        return standard_transforms(self.crop_size, self.scale, is_rgb=self.image_format.is_rgb)

    def check_training(self, source: Source) -> None:
        """Look at the training samples before the first step; quick checks only."""

    def prepare(self, progress: Progress = silent) -> None:
        """Get and unpack the data; nothing to do, unless a subclass knows where to get them."""

    def setup(self, stage: str | None = None) -> None:
        """Look up the files of a stage and build its data sets."""
        if stage in (None, "fit"):
            self.train_dataset = self._train_dataset()
        if stage in (None, "fit", "validate"):
            self.val_dataset = self._eval_dataset(self._checked_source("val"))
        if stage == "test":
            self.test_dataset = self._eval_dataset(self._checked_source("test"))
        if stage == "predict":
            self.predict_dataset = self._eval_dataset(self._predict_source())

    def train_dataloader(self) -> Loader:
        """Training batches of (pass, index) samples in the endless order."""
        overfits = getattr(self.trainer, "overfit_batches", 0) > 0
        sampler = (FirstSteps if overfits else EndlessSampler)(
            len(self.train_dataset),
            self.batch_size,
            self.seed,
            *self._world(),
            1 if self.trainer is None else self.trainer.accumulate_grad_batches,
            self._n_batches_done,
        )
        return self._loader(self.train_dataset, sampler, self.batch_size)

    def val_dataloader(self) -> Loader:
        """Every validation image once, over all ranks."""
        return self._eval_loader(self.val_dataset)

    def test_dataloader(self) -> Loader:
        """Every test image once, over all ranks."""
        return self._eval_loader(self.test_dataset)

    def predict_dataloader(self) -> Loader:
        """Every image of the folder once; masks are 255 and have the image file's size."""
        return self._eval_loader(self.predict_dataset)

    def open_source(self, split: str) -> Source:
        """Return the source of a split with the classes that `class_names` names."""
        source = self.make_source(split)
        return Grouped(source, self.class_groups.table) if self.class_groups else source

    def _try_transforms(self, transforms: "list[BasicTransform | BaseCompose]") -> None:
        from seglab.data.transforms.trial import refuse_label_changes, refuse_unfit

        refuse_label_changes(transforms)
        if not self.image_format.is_rgb:
            channels, value_range, _ = self.image_format
            refuse_unfit(transforms, channels, is_deep=value_range is not None)

    def _checked_source(self, split: str) -> Source:
        source = self.open_source(split)
        self.check_source(source)
        return source

    def _train_source(self) -> Source:
        source = self._checked_source("train")
        self.check_training(source)
        if self.cache_folder is not None:
            source = cache_files(source, self.cache_folder, self.cache_gib * 2**30)
        if self.limit is not None:
            source = limit_source(source, self.limit)
        if self.repeat_rare is not None:
            source = repeat_rare_classes(source, self.repeat_rare, self.seed)
        return source

    def _predict_source(self) -> Source:
        cure = "set data.predict_folder to a folder of images"
        if self.predict_folder is None:
            raise DataError(f"predict needs images: {cure}")
        images = find_images_below(require_folder(Path(self.predict_folder), cure))
        items = [Item(path, None, name) for name, path in images.items()]
        return FileSource(items, LabelTable(self.num_classes), self.image_format)

    def _train_dataset(self) -> SegmentationDataset:
        transforms = self.default_transforms() if self.transforms is None else self.transforms
        augment = Augment(transforms, self.seed) if transforms else None
        return SegmentationDataset(self._train_source(), augment)

    def _eval_dataset(self, source: Source) -> SegmentationDataset:
        return SegmentationDataset(Resized(source, self.eval_scale) if self.eval_scale else source)

    def _eval_loader(self, dataset: SegmentationDataset) -> Loader:
        mixed = self.eval_batch_size == 1  # then shapes need not be looked up
        shapes = len(dataset) if mixed else [dataset.source.shapes(i) for i in range(len(dataset))]
        sampler = EqualShapeBatches(shapes, self.eval_batch_size, *self._world())
        return self._loader(dataset, sampler, batch_size=None)

    def _loader(self, dataset: SegmentationDataset, sampler: Any, batch_size: int | None) -> Loader:
        return Loader(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_init_worker,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # leave the global stream alone
        )

    def _world(self) -> tuple[int, int]:
        if self.trainer is not None:  # data-parallel ranks; None where there is one process
            ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
            return ranks["num_replicas"], ranks["rank"]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0

    def _n_batches_done(self) -> int | None:
        """Batches of this rank trained so far, as the trainer counts and checkpoints them."""
        if self.trainer is None or not self.trainer.training:
            return None
        return count_all_batches(self.trainer)


def _init_worker(worker_id: int) -> None:
    import cv2

    cv2.setNumThreads(0)  # a worker is one thread; OpenCV would start one per core in each
    if hasattr(os, "setpgrp"):
        # A terminal sends Ctrl-C to the whole process group; the trainer still needs batches to
        # finish its step. Workers end by themselves when the trainer does.
        os.setpgrp()


def _check_value_range(value_range: tuple[float, float] | None) -> None:
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(
            f"data.value_range {list(value_range)} must be [value of black, value of white], rising"
        )


def _check_classes(class_names: tuple[str, ...], palette: Sequence[Color]) -> None:
    repeated = sorted({name for name in class_names if class_names.count(name) > 1})
    if not class_names or repeated:
        raise ValueError(f"class_names must be distinct and not empty; repeated: {repeated}")
    if len(palette) != len(class_names):
        raise ValueError(
            f"palette has {len(palette)} colours for {len(class_names)} classes; "
            "give one RGB triple per class or leave it out"
        )
