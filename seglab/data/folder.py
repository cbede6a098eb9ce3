"""Own images: any folder of images and masks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from seglab.data.base import SegmentationDataModule
from seglab.data.errors import DataError, MissingDataError
from seglab.data.sources.class_list import refuse_other_classes
from seglab.data.sources.division import Division
from seglab.data.sources.files import FileSource, Item
from seglab.data.sources.labels import ColorTable, LabelTable, check_class_count
from seglab.data.sources.layouts import find_pairs, read_list
from seglab.data.sources.source import IGNORE_INDEX, Source
from seglab.data.sources.split_lists import read_split_list
from seglab.palette import Color

LAYOUT = (
    "data.root must hold train/images, train/masks, val/images and val/masks (for test also "
    "test/images and test/masks, or set data.test_split to val); other layouts: data.images, "
    "data.masks, data.list, data.val_fraction"
)


class FolderDataModule(SegmentationDataModule):
    """Images and masks in folders: ``root/{train,val[,test]}/{images,masks}``, or as told.

    Images are JPEG, PNG, TIFF, BMP, WebP, PPM or NPY of any depth and number of bands (`channels`,
    `value_range`); EXIF orientation is applied. A mask is PNG, TIFF, BMP or NPY: class ids in one
    band (grey or palette, 8 or 16 bits), or RGB colours with `colors`. 255 is ignored.

    Args:
        root: Folder of all files.
        class_names: One name per class id, from 0.
        palette: One RGB triple per class for pictures; `colors`, or PASCAL VOC's, when left out.
        value_map: Raw mask value to class id or 255, for values that are not the id already.
        colors: Class name to the RGB triple (or triples) of its pixels, where masks are colours;
            those of "ignore" are ignored, any other colour is an error.
        images: Pattern of the image files in `root`, as ``{split}/images/*`` or ``**/*_img.png``.
        masks: Where an image's mask is: ``{split}/masks/{stem}``, or ``{stem}_label.png`` for the
            image's own folder (`seglab.data.sources.layouts`); without a suffix, any of a mask.
        list: Text or CSV file with image,mask[,split] per line, instead of patterns; or, with
            ``{split}`` in its name, one file per split (``train.txt``, ``val.txt``), of pairs or
            of names of images that `images` and `masks` find.
        val_fraction: Share of the images for validation, chosen by a hash of their names, where
            files are not divided into splits.
        folds: Number of cross-validation folds, instead of a share.
        fold: Which fold validates, from 0.
        group: Regular expression: images in whose names it matches the same text stay together,
            as ``^[^_]+`` for the frames of one video.
        crop_size: Height and width of training crops.
        scale: (long, short) box of the random resize at ratio 1; each image's own size if None.
        val_split: Folder (or name in the list) of the validation split.
        test_split: Split that `test` uses.
        options: As in `SegmentationDataModule`.

    Raises:
        ValueError: For arguments that contradict each other.
        DataError: In `setup`, for what is wrong with folders, pairs or sizes; when a file is
            read, for its pixels. `MissingDataError`, if a folder is missing.

    >>> data = FolderDataModule("street", class_names=["road", "car"], value_map={11: 255})
    >>> data.num_classes, data.palette
    (2, ((0, 0, 0), (128, 0, 0)))
    """

    has_own_classes = True

    def __init__(
        self,
        root: str,
        class_names: Sequence[str],
        palette: Sequence[Color] | None = None,
        *,
        value_map: dict[int, int] | None = None,
        colors: dict[str, list[int] | list[list[int]]] | None = None,
        images: str = "{split}/images/*",
        masks: str = "{split}/masks/{stem}",
        list: str | None = None,  # noqa: A002  # the name users type
        val_fraction: float | None = None,
        folds: int | None = None,
        fold: int = 0,
        group: str | None = None,
        crop_size: tuple[int, int] | None = (512, 512),
        scale: tuple[int, int] | None = None,
        val_split: str = "val",
        test_split: str = "test",
        **options: Any,
    ) -> None:
        check_class_count(len(class_names))
        if colors is not None and value_map is not None:
            raise ValueError(
                "data.colors is for masks of colours, data.value_map for ids; give one"
            )
        palette = palette or _palette_of(colors, class_names)
        super().__init__(class_names, palette, crop_size=crop_size, scale=scale, **options)
        self.root = Path(root)
        self.names_of_ids = tuple(class_names)  # before they are grouped
        self.labels: LabelTable | ColorTable = LabelTable(len(class_names), value_map)
        if colors is not None:
            self.labels = ColorTable(class_names, colors)
        self.images, self.masks, self.list = images, masks, list
        self.division = Division(val_fraction, folds, fold, group)
        self.division.check()
        self.names = {"val": val_split, "test": val_split if test_split == "val" else test_split}

    def make_source(self, split: str) -> Source:
        """Find the pairs of a split, by patterns or in the list."""
        wanted = self.names.get(split, split)
        items = self._find(wanted)
        if isinstance(self.labels, LabelTable) and not self.labels.value_map:
            refuse_other_classes(items, self.root, self.names_of_ids)
        return FileSource(items, self.labels, self.image_format)

    def _find(self, split: str) -> "list[Item]":
        if not self.list:
            return self._from_patterns(split)
        if "{split}" not in self.list:
            return self._from_list(split)
        if self.division.is_given:
            raise DataError(
                f"data.list {self.list} has splits already; leave out {{split}}, or "
                "data.val_fraction and data.folds"
            )
        return read_split_list(self.root, self.list, split, self.images, self.masks, LAYOUT)

    def check_source(self, source: Source) -> None:
        """Compare the sizes of all images and masks by their headers; look for a second class."""
        for index in range(len(source)):
            source.shapes(index)

    def check_training(self, source: Source) -> None:
        """Read masks until two classes have been seen.

        Raises:
            DataError: If no mask has a second class: there would be nothing to learn.
        """
        seen: set[int] = set()
        for index in range(len(source)):
            seen |= set(np.unique(source.read_mask(index)).tolist())
            if len(seen - {IGNORE_INDEX}) > 1:
                return
        names = [self.class_names[label] for label in sorted(seen - {IGNORE_INDEX})]
        cure = "look at them with `doctor`"
        if isinstance(self.labels, LabelTable) and IGNORE_INDEX in seen and names:
            absent = next(i for i in range(self.num_classes) if i not in seen)
            cure = (
                f"255 means ignored; if it is {self.class_names[absent]!r}, set data.value_map: "
                f"{{255: {absent}}}"
            )
        raise DataError(
            f"none of the {len(source)} training masks has two classes: they hold "
            f"{', '.join(names) or 'none'}{' and 255' * (IGNORE_INDEX in seen)}; {cure}"
        )

    def _from_list(self, split: str) -> "list[Item]":
        entries = read_list(self.root, Path(self.list or ""))
        own = [entry.item for entry in entries if entry.split in (None, split)]
        if any(entry.split for entry in entries):
            if not own:
                found = sorted({entry.split or "" for entry in entries})
                raise MissingDataError(
                    f"data.list {self.list} has no line of split {split!r}: {found}"
                )
            return own
        if not self.division.is_given:
            raise DataError(
                f"data.list {self.list} names no splits; add a third column of train and val, or "
                "set data.val_fraction: 0.2"
            )
        return self.division.choose(own, self._half(split))

    def _from_patterns(self, split: str) -> "list[Item]":
        if "{split}" in self.images:
            if not self.root.is_dir():
                raise MissingDataError(f"no folder {self.root}; {LAYOUT}")
            if self.division.is_given:
                raise DataError(
                    f"data.images {self.images!r} has splits already; leave out {{split}}, or "
                    "data.val_fraction and data.folds"
                )
            return find_pairs(self.root, self.images, self.masks, split, LAYOUT)
        if not self.division.is_given:
            raise DataError(
                f"data.images {self.images!r} has no {{split}}: set data.val_fraction: 0.2 (or "
                "data.folds) to divide the images"
            )
        items = find_pairs(self.root, self.images, self.masks, split, LAYOUT)
        return self.division.choose(items, self._half(split))

    def _half(self, split: str) -> str:
        """Which half of images divided by a share a split is."""
        if split == self.names["val"]:
            return "val"
        if split != "train":
            raise MissingDataError(
                f"images divided by a share have no split {split!r}; set data.test_split: val"
            )
        return "train"


def _palette_of(
    colors: Mapping[str, Any] | None, class_names: Sequence[str]
) -> Sequence[Color] | None:
    """The first colour of every class in the masks, if masks are colours."""
    if colors is None or any(name not in colors for name in class_names):
        return None
    firsts = [colors[name] for name in class_names]
    return [tuple(color if isinstance(color[0], int) else color[0]) for color in firsts]
