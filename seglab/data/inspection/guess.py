"""Look at a folder of images and masks and guess the arguments of `FolderDataModule`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from seglab.data.inspection.contents import Bands, guess_images, guess_masks
from seglab.data.inspection.known_layouts import guess_layout
from seglab.data.inspection.known_lists import (
    LIST_PLACES,
    LIST_SUFFIXES,
    guess_list,
    guess_split_lists,
)
from seglab.data.inspection.known_splits import guess_splits
from seglab.data.inspection.readable import Readable
from seglab.data.inspection.stock import VAL_NAMES
from seglab.data.sources.class_list import find_class_list
from seglab.data.sources.files import Item
from seglab.data.sources.layouts import find_pairs
from seglab.data.sources.reading import IMAGE_SUFFIXES, read_shape
from seglab.sentences import listed

_N_EXAMINED = 2000


@dataclass
class Guess:
    """What was found in a folder.

    Attributes:
        arguments: Of `FolderDataModule`, beside root, classes and sizes.
        class_names: One per class; placeholders for the user to replace.
        shape: Median height and width of the images.
        n_images: How many pairs were found.
        bands: Mean and standard deviation of every band, for images that are no 8-bit RGB.
        remarks: What the user should look at.
        shares: Of the pixels, for every class.
    """

    arguments: dict[str, Any]
    class_names: list[str]
    shape: tuple[int, int]
    n_images: int
    bands: Bands | None = None
    remarks: list[str] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


def guess_folder(root: Path, patterns: tuple[str, str] | None = None) -> Guess:
    """Guess layout, kind of images and kind of masks.

    Files that cannot be decoded are left out of the guess and told in its remarks.

    Args:
        root: The folder.
        patterns: `images` and `masks` of `FolderDataModule`, where they are known.

    Raises:
        NoLayoutError: If the folder is there, and no known layout fits it.
        DataError: If no pairs of images and masks are found, or masks that nothing can be learned
            from; says what is there.
    """
    layout, items, remarks = _find_layout(root, patterns)
    readable = Readable()
    some = items[:: -(-len(items) // _N_EXAMINED)]
    masks = guess_masks(some, find_class_list(some, root), readable)
    images, bands, about_images = guess_images(some, readable)
    shapes = np.array([shape for _, shape in readable.only(read_shape, some, "image")])
    height, width = (int(side) for side in np.median(shapes, axis=0))
    return Guess(
        {**layout, **images, **masks.arguments},
        masks.class_names,
        (height, width),
        len(items),
        bands,
        [*readable.remarks(), *masks.remarks, *about_images, *remarks, *_unused(root, items)],
        masks.shares,
    )


def _find_layout(
    root: Path, patterns: tuple[str, str] | None
) -> tuple[dict[str, Any], list[Item], list[str]]:
    found = guess_split_lists(root, patterns)
    if found is not None:
        return found
    if patterns is None:
        return guess_list(root) or _guess_patterns(root, *guess_layout(root))
    images, masks = patterns
    items = find_pairs(root, images, masks, "train", "correct --images")
    return _guess_patterns(root, {"images": images, "masks": masks}, items)


def _guess_patterns(
    root: Path, layout: dict[str, str], items: list[Item]
) -> tuple[dict[str, Any], list[Item], list[str]]:
    splits, more, remarks = guess_splits(root, layout, items)
    lists = [
        path.relative_to(root).as_posix()
        for place, suffix, name in product(LIST_PLACES, LIST_SUFFIXES, ("train", *VAL_NAMES))
        if (path := root / place / f"{name}{suffix}").is_file()
    ]
    if lists:
        remarks = [*remarks, f"{listed(lists)} beside the images: not used for the splits"]
    return {**layout, **splits}, [*items, *more], remarks


def _unused(root: Path, items: Sequence[Item]) -> list[str]:
    """Image files of the folder that the layout leaves out."""
    used = {path for item in items for path in (item.image, item.mask)}
    found = (path for path in sorted(root.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES)
    rest = [path.relative_to(root).as_posix() for path in found if path not in used]
    return [f"{len(rest)} image file(s) are in no pair: {listed(rest)}"] if rest else []
