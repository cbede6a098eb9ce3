"""PASCAL VOC 2012 with the additional labels of SBD: "VOC aug"."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from seglab.data.classes import VOC_COLORS, VOC_NAMES
from seglab.data.download import Archive, Progress, silent
from seglab.data.errors import DataError
from seglab.data.official import OfficialDataModule, complete
from seglab.data.sources.files import Item
from seglab.data.sources.labels import LabelTable
from seglab.data.sources.masks import read_mask
from seglab.data.sources.source import Source

if TYPE_CHECKING:
    from albumentations import BaseCompose, BasicTransform

_SBD_PNG = "cls_png"  # our own folder beside SBD's cls: the same labels, decoded much faster


class VOCAugDataModule(OfficialDataModule):
    """10,582 training images (VOC 2012 train and SBD) and the 1,449 of VOC 2012 val.

    Expects ``VOCdevkit/VOC2012`` and ``benchmark_RELEASE/dataset`` in `root`. The training list
    is derived from the official ones, ``(VOC train + SBD train + SBD val) - VOC val``; VOC's own
    label is used where both have one. SBD's labels are read from its ``cls/*.mat``, or from the
    PNG copies that `prepare` makes. Class 0 is the background; 255, VOC's borders, is ignored.
    The labels of the test set are not public; `test` uses the validation set.

    Args:
        root: See `OfficialDataModule`, as for all that is not explained here.
        crop_size: Height and width of training crops.
        scale: (long, short) box of the random resize at ratio 1.
        eval_scale: (long, short) box for evaluation: the short side becomes 512.
        options: As in `OfficialDataModule` and `SegmentationDataModule`.

    >>> data = VOCAugDataModule("data")
    >>> data.num_classes, data.class_names[1], data.palette[1]
    (21, 'aeroplane', (128, 0, 0))
    """

    archives = (
        Archive(
            "VOCtrainval_11-May-2012.tar",
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "6cd6e144f989b92b3379bac3b3de84fd",
            "VOCdevkit/VOC2012",
            1_999_639_040,
        ),
        Archive(
            "benchmark.tgz",
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
            "semantic_contours/benchmark.tgz",
            "82b4d87ceb2ed10f6038a1cba92111cb",
            "benchmark_RELEASE",
            1_419_539_633,
        ),
    )
    n_official: ClassVar = {"train": 10582, "val": 1449, "test": 1449}

    def __init__(
        self,
        root: str,
        *,
        crop_size: tuple[int, int] | None = (512, 512),
        scale: tuple[int, int] | None = (2048, 512),
        eval_scale: tuple[int, int] | None = (2048, 512),
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            VOC_NAMES,
            VOC_COLORS,
            crop_size=crop_size,
            scale=scale,
            eval_scale=eval_scale,
            **options,
        )
        self.labels = LabelTable(len(VOC_NAMES), None, "the file is damaged")

    def default_transforms(self) -> "list[BasicTransform | BaseCompose]":
        """The standard recipe; only VOC's pads raw pixels with 0, not with the mean colour."""
        if self.crop_size is None:
            return []
        from seglab.data.transforms import standard_transforms

        return standard_transforms(self.crop_size, self.scale, fill=(0, 0, 0))

    def make_source(self, split: str) -> Source:
        """List the images of a split and find each one's label."""
        voc = self._find_root("VOCdevkit/VOC2012", "JPEGImages")
        if split != "train":
            ids = _read_ids(voc / "ImageSets/Segmentation/val.txt")
            own = dict.fromkeys(sorted(ids), voc / "SegmentationClass")
            return self._files(split, complete(lambda: _find(voc, own), voc), self.labels)
        sbd = self._find_root("benchmark_RELEASE/dataset", "cls")
        sources = _training_folders(voc, sbd)
        return self._files(split, complete(lambda: _find(voc, sources), voc), self.labels)

    def prepare(self, progress: Progress = silent) -> None:
        """Fetch and unpack both archives; then copy SBD's labels to PNG files."""
        super().prepare(progress)
        convert_labels(self._find_root("benchmark_RELEASE/dataset", "cls"), progress)


def convert_labels(sbd: Path, progress: Progress = silent) -> Path:
    """Copy ``cls/*.mat`` to 8-bit PNG files, whole or not at all.

    Args:
        sbd: SBD's ``dataset`` folder.
        progress: Called with (what, files done, files in all).

    Returns:
        The folder of the copies.
    """
    from PIL import Image

    target, staging = sbd / _SBD_PNG, sbd / f".{_SBD_PNG}.part"
    if target.exists():
        return target
    staging.mkdir(exist_ok=True)
    paths = sorted((sbd / "cls").glob("*.mat"))
    for n_done, path in enumerate(paths, start=1):
        Image.fromarray(read_mask(path)).save(staging / f"{path.stem}.png")
        progress("SBD labels", n_done, len(paths))
    return staging.rename(target)


def _training_folders(voc: Path, sbd: Path) -> dict[str, Path]:
    """The 10,582 ids, sorted, each with the folder of its label."""
    own = _read_ids(voc / "ImageSets/Segmentation/train.txt")
    held_out = _read_ids(voc / "ImageSets/Segmentation/val.txt")
    extra = _read_ids(sbd / "train.txt") | _read_ids(sbd / "val.txt")
    labels = sbd / _SBD_PNG if (sbd / _SBD_PNG).is_dir() else sbd / "cls"
    ids = sorted((own | extra) - held_out)
    return {name: voc / "SegmentationClass" if name in own else labels for name in ids}


def _find(voc: Path, folders: dict[str, Path]) -> list[Item]:
    suffixes = {folder: ".mat" if folder.name == "cls" else ".png" for folder in folders.values()}
    present = {folder: {path.name for path in folder.iterdir()} for folder in suffixes}
    images = {path.name for path in (voc / "JPEGImages").iterdir()}
    items = []
    for name, folder in folders.items():
        label = name + suffixes[folder]
        for where, file in ((images, f"{name}.jpg"), (present[folder], label)):
            if file not in where:
                place = voc / "JPEGImages" if where is images else folder
                raise DataError(f"the lists name {place / file}, but there is no such file")
        items.append(Item(voc / "JPEGImages" / f"{name}.jpg", folder / label, name))
    return items


def _read_ids(path: Path) -> set[str]:
    try:
        return set(path.read_text().split())
    except OSError as error:
        raise DataError(
            f"cannot read the list {path}: {error.strerror}; unpack the archive again"
        ) from error
