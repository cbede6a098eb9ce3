"""Read images and masks from pairs of files."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seglab.data.errors import DataError
from seglab.data.sources.labels import Labels
from seglab.data.sources.masks import read_mask
from seglab.data.sources.reading import Array, ImageFormat, has_orientation, read_image, read_shape
from seglab.data.sources.source import IGNORE_INDEX, Pixels, Shapes, Source


class Item(NamedTuple):
    """One image file, its mask file (None: no labels) and the sample's name."""

    image: Path
    mask: Path | None
    name: str


class FileSource(Source):
    """Images and masks from files.

    Args:
        items: The files, in order.
        labels: Maps a raw mask to class ids; gets the path too, for its errors.
        image_format: What the image files hold; 8-bit RGB when left out.

    Raises:
        DataError: In reading, if a file is unreadable, sizes disagree or a value is not allowed.
    """

    def __init__(
        self, items: Sequence[Item], labels: Labels, image_format: ImageFormat | None = None
    ) -> None:
        self.items = list(items)
        self.labels = labels
        self.image_format = image_format or ImageFormat()

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """Return the item's name."""
        return self.items[index].name

    def shapes(self, index: int) -> Shapes:
        """Read both shapes from the file headers."""
        item = self.items[index]
        image = read_shape(item.image)
        shapes = Shapes(image, read_shape(item.mask) if item.mask else image)
        _check_sizes(item, shapes)
        return shapes

    def read(self, index: int, epoch: int = 0) -> tuple[Pixels, Pixels]:
        """Decode both files; without a mask file everything is 255."""
        item = self.items[index]
        image, raw = self.decode(index)
        mask = raw if item.mask is None else self.labels(raw, item.mask)
        _check_sizes(item, Shapes(image.shape[:2], mask.shape))
        return image, mask

    def decode(self, index: int) -> tuple[Pixels, Array]:
        """Decode image and raw mask."""
        item = self.items[index]
        image = read_image(item.image, self.image_format)
        if item.mask is None:
            return image, np.full(image.shape[:2], IGNORE_INDEX, np.uint8)
        return image, read_mask(item.mask)

    def read_mask(self, index: int) -> Pixels:
        """Decode the mask file alone."""
        path = self.items[index].mask
        return super().read_mask(index) if path is None else self.labels(read_mask(path), path)


def _check_sizes(item: Item, shapes: Shapes) -> None:
    if shapes.image != shapes.mask:
        (height, width), (mask_height, mask_width) = shapes
        turned = has_orientation(item.image)
        raise DataError(
            f"{item.image} is {width}x{height} pixels but its mask {item.mask} is "
            f"{mask_width}x{mask_height}; export them at one size"
            + turned
            * " (the image's EXIF orientation was applied: draw masks on what viewers show)"
        )
