"""ADE20K, the scene-parsing subset of 150 classes."""

from typing import Any, ClassVar

from seglab.data.classes import ADE20K_COLORS, ADE20K_NAMES
from seglab.data.download import Archive
from seglab.data.official import OfficialDataModule, complete
from seglab.data.sources.labels import LabelTable
from seglab.data.sources.listing import find_images, find_masks, pair, require_folder
from seglab.data.sources.source import IGNORE_INDEX, Source

_SPLITS = {"train": "training", "val": "validation", "test": "validation"}


class ADE20KDataModule(OfficialDataModule):
    """ADEChallengeData2016: 20,210 training and 2,000 validation images.

    Expects ``ADEChallengeData2016/{images,annotations}/{training,validation}`` in `root` (or
    `root` to be that folder). In the files 0 is "other" and 1..150 are the classes; here 0 is
    ignored and classes count from 0 (MMSegmentation's ``reduce_zero_label``). The labels of the
    test set are not public; `test` uses the validation set.

    Args:
        root: See `OfficialDataModule`, as for all that is not explained here.
        crop_size: Height and width of training crops.
        scale: (long, short) box of the random resize at ratio 1.
        eval_scale: (long, short) box for evaluation: the short side becomes 512.
        options: As in `OfficialDataModule` and `SegmentationDataModule`.

    >>> data = ADE20KDataModule("data")
    >>> data.num_classes, data.class_names[:2], data.palette[2]
    (150, ('wall', 'building'), (6, 230, 230))
    """

    archives = (
        Archive(
            "ADEChallengeData2016.zip",
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "7328b3957e407ddae1d3cbf487f149ef",
            "ADEChallengeData2016",
        ),
    )
    n_official: ClassVar = {"train": 20210, "val": 2000, "test": 2000}

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
            ADE20K_NAMES,
            ADE20K_COLORS,
            crop_size=crop_size,
            scale=scale,
            eval_scale=eval_scale,
            **options,
        )
        shifted = {raw: raw - 1 for raw in range(1, 151)}
        self.labels = LabelTable(150, {0: IGNORE_INDEX} | shifted, "the file is damaged")

    def make_source(self, split: str) -> Source:
        """Pair images and annotations by their stems."""
        home = self._find_root("ADEChallengeData2016", "images")
        images, masks = (
            require_folder(home / kind / _SPLITS[split], "the archive is half unpacked")
            for kind in ("images", "annotations")
        )
        items = complete(lambda: pair(find_images(images), find_masks(masks), masks), home)
        return self._files(split, items, self.labels)
