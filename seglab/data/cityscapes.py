"""Cityscapes, the finely annotated part."""

from pathlib import Path
from typing import Any, ClassVar

from seglab.data.classes import CITYSCAPES_COLORS, CITYSCAPES_NAMES
from seglab.data.download import Archive
from seglab.data.official import OfficialDataModule, complete
from seglab.data.sources.labels import LabelTable
from seglab.data.sources.listing import pair, require_folder
from seglab.data.sources.source import IGNORE_INDEX, Pixels, Source

# cityscapesScripts, helpers/labels.py: ids of the 19 classes that are trained and evaluated
TRAINED_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_N_IDS = 34
_TRAIN_IDS, _ALL_IDS = "_gtFine_labelTrainIds", "_gtFine_labelIds"
_PAGE = "https://www.cityscapes-dataset.com/downloads/"


class CityscapesDataModule(OfficialDataModule):
    """Cityscapes fine: 2,975 training and 500 validation images of 2048 x 1024 pixels.

    Expects ``leftImg8bit/{train,val}/CITY`` and ``gtFine/{train,val}/CITY`` in `root`. The 34
    label ids become the 19 train ids while reading (all others are ignored); where
    ``*_labelTrainIds.png`` exist, they are used. The labels of the test set are not public;
    `test` uses the validation set.

    Args:
        root: See `OfficialDataModule`, as for all that is not explained here.
        crop_size: Height and width of training crops.
        scale: (long, short) box of the random resize at ratio 1.
        options: As in `OfficialDataModule` and `SegmentationDataModule`.

    >>> data = CityscapesDataModule("data")
    >>> data.num_classes, data.class_names[0], data.palette[0]
    (19, 'road', (128, 64, 128))
    """

    archives = (
        Archive(
            "leftImg8bit_trainvaltest.zip",
            None,
            "0a6e97e94b616a514066c9e2adb0c97f",
            "leftImg8bit",
            11_592_327_197,
        ),
        Archive(
            "gtFine_trainvaltest.zip",
            None,
            "4237c19de34c8a376e9ba46b495d6f66",
            "gtFine",
            252_567_705,
        ),
    )
    n_official: ClassVar = {"train": 2975, "val": 500, "test": 500}

    def __init__(
        self,
        root: str,
        *,
        crop_size: tuple[int, int] | None = (512, 1024),
        scale: tuple[int, int] | None = (2048, 1024),
        **options: Any,
    ) -> None:
        super().__init__(
            root, CITYSCAPES_NAMES, CITYSCAPES_COLORS, crop_size=crop_size, scale=scale, **options
        )
        trained = {raw: label for label, raw in enumerate(TRAINED_IDS)}
        ids = {raw: trained.get(raw, IGNORE_INDEX) for raw in range(_N_IDS)}
        self._all_ids = LabelTable(len(CITYSCAPES_NAMES), ids, "the file is damaged")
        self._train_ids = LabelTable(len(CITYSCAPES_NAMES), None, "the file is damaged")

    def labels(self, mask: Pixels, path: Path) -> Pixels:
        """Map a raw mask to train ids; its file name tells what it holds."""
        table = self._train_ids if path.stem.endswith(_TRAIN_IDS) else self._all_ids
        return table(mask, path)

    def make_source(self, split: str) -> Source:
        """Pair the images and labels of all cities of a split."""
        folder = "val" if split == "test" else split
        home = self._find_root(".", "leftImg8bit")
        images, labels = (
            require_folder(home / kind / folder, self._instructions())
            for kind in ("leftImg8bit", "gtFine")
        )
        items = complete(
            lambda: pair(_list(images, "_leftImg8bit"), _list_labels(labels), labels), home
        )
        return self._files(split, items, self.labels)

    def _instructions(self) -> str:
        names = " and ".join(archive.name for archive in self.archives)
        return (
            f"Cityscapes needs an account: get {names} from {_PAGE} "
            f"(or with `csDownload` of the package cityscapesscripts), put both into {self.root} "
            "and run prepare, which checks and unpacks them"
        )


def _list(folder: Path, ending: str) -> dict[str, Path]:
    paths = sorted(folder.glob(f"*/*{ending}.png"))
    return {path.stem.removesuffix(ending): path for path in paths}


def _list_labels(folder: Path) -> dict[str, Path]:
    return _list(folder, _ALL_IDS) | _list(folder, _TRAIN_IDS)
