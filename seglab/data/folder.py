"""Own images: folders of images and masks with equal file names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seglab.data.base import SegmentationDataModule
from seglab.data.sources.files import FileSource
from seglab.data.sources.labels import LabelTable
from seglab.data.sources.listing import find_images, find_masks, pair, require_folder
from seglab.data.sources.source import Source
from seglab.palette import Color

_LAYOUT = (
    "data.root must hold train/images, train/masks, val/images and val/masks (for test also "
    "test/images and test/masks, or set data.test_split to val)"
)


class FolderDataModule(SegmentationDataModule):
    """Images and masks in ``root/{train,val[,test]}/{images,masks}``.

    A mask is a single-channel 8-bit PNG, palette or grey, whose values are class ids; it has its
    image's stem (``images/a.jpg``, ``masks/a.png``) and its size. 255 is ignored.

    Args:
        root: Folder of the splits.
        class_names: One name per class id, from 0.
        palette: One RGB triple per class; PASCAL VOC's colours when left out.
        value_map: Raw mask value to class id or 255, for values that are not the id already.
        crop_size: Height and width of training crops.
        scale: (long, short) box of the random resize at ratio 1; each image's own size if None.
        test_split: Folder that `test` uses.
        options: As in `SegmentationDataModule`.

    Raises:
        DataError: In `setup`, for what is wrong with folders, pairs or sizes; when a file is
            read, for its pixels. `MissingDataError`, if a folder is missing.

    >>> data = FolderDataModule("street", class_names=["road", "car"], value_map={11: 255})
    >>> data.num_classes, data.palette
    (2, ((0, 0, 0), (128, 0, 0)))
    """

    def __init__(
        self,
        root: str,
        class_names: Sequence[str],
        palette: Sequence[Color] | None = None,
        *,
        value_map: dict[int, int] | None = None,
        crop_size: tuple[int, int] | None = (512, 512),
        scale: tuple[int, int] | None = None,
        test_split: str = "test",
        **options: Any,
    ) -> None:
        super().__init__(class_names, palette, crop_size=crop_size, scale=scale, **options)
        self.root = Path(root)
        self.labels = LabelTable(len(class_names), value_map)
        self.test_split = test_split

    def make_source(self, split: str) -> Source:
        """Pair the files of a split by their stems."""
        folder = self.root / (self.test_split if split == "test" else split)
        images, masks = (require_folder(folder / kind, _LAYOUT) for kind in ("images", "masks"))
        return FileSource(pair(find_images(images), find_masks(masks), masks), self.labels)

    def check_source(self, source: Source) -> None:
        """Compare the sizes of all images and masks, by the headers alone."""
        for index in range(len(source)):
            source.shapes(index)
