"""Look at a folder of images and masks and guess the arguments of `FolderDataModule`."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from seglab.data.errors import DataError, MissingDataError
from seglab.data.sources.files import Item
from seglab.data.sources.labels import count_colors, unpack_color
from seglab.data.sources.layouts import find_pairs
from seglab.data.sources.listing import holds
from seglab.data.sources.masks import read_mask
from seglab.data.sources.reading import decode_image, read_shape
from seglab.data.sources.source import IGNORE_INDEX
from seglab.sentences import listed

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages", "rgb")
MASK_FOLDERS = (
    "masks",
    "mask",
    "labels",
    "label",
    "annotations",
    "labelsTr",
    "gt",
    "SegmentationClass",
)
MASK_SUFFIXES = ("_mask", "_label", "_labels", "_gt", "_seg", "_segmentation", "")
VAL_NAMES = ("val", "valid", "validation", "test")
_PLAIN = ("png", "tif", "tiff")
_PHOTOS = ("jpg", "jpeg", "JPG")
_N_EXAMINED = 200
_MIN_SHARE = 1e-3  # of the pixels: rarer colours are blended borders
_MAX_CLASSES = 64


@dataclass
class Guess:
    """What was found in a folder.

    Attributes:
        arguments: Of `FolderDataModule`, beside root, classes and sizes.
        class_names: One per class; placeholders for the user to replace.
        shape: Median height and width of the images.
        n_images: How many pairs were found.
        remarks: What the user should look at.
    """

    arguments: dict[str, Any]
    class_names: list[str]
    shape: tuple[int, int]
    n_images: int
    remarks: list[str] = field(default_factory=list)


def guess_folder(root: Path) -> Guess:
    """Guess layout, kind of images and kind of masks.

    Raises:
        DataError: If no pairs of images and masks are found; says what is there.
    """
    layout, items = _guess_layout(root)
    some = items[:: max(1, len(items) // _N_EXAMINED)]
    masks, class_names, remarks = _guess_masks(some)
    images, more = _guess_images(some)
    shapes = np.array([read_shape(item.image) for item in some])
    height, width = (int(side) for side in np.median(shapes, axis=0))
    return Guess(
        {**layout, **images, **masks}, class_names, (height, width), len(items), remarks + more
    )


def _guess_layout(root: Path) -> tuple[dict[str, Any], list[Item]]:
    tried = []
    for layout in _layouts(root):
        images, masks = layout["images"], layout["masks"]
        if not any(True for _ in root.glob(images.replace("{split}", "train"))):
            continue
        tried.append(images)
        try:
            return layout, find_pairs(root, images, masks, "train", "")
        except DataError:
            continue
    if not root.is_dir():
        raise MissingDataError(f"no folder {root}")
    raise DataError(
        f"{root}: no layout fits all its images and masks (tried {listed(tried) or 'none'}); write "
        f"data.images and data.masks yourself; {holds(root)}"
    )


def _layouts(root: Path) -> Iterator[dict[str, Any]]:
    """Layouts, the most telling first."""
    for images, masks, suffix in product(IMAGE_FOLDERS, MASK_FOLDERS, MASK_SUFFIXES):
        end = f"{{subfolder}}/{{stem}}{suffix}"
        if (root / "train" / images).is_dir():
            yield _divide(root, f"train/{images}/**/*", f"train/{masks}/{end}", "train/")
        if (root / images / "train").is_dir():
            yield _divide(root / images, f"{images}/train/**/*", f"{masks}/train/{end}", "train/")
        elif (root / images).is_dir():
            yield _divide(root, f"{images}/**/*", f"{masks}/{end}")
    kinds = [f"*{kind}.{end}" for kind in ("_img", "_image", "_rgb") for end in _PLAIN + _PHOTOS]
    for name, suffix in product(kinds, MASK_SUFFIXES[:-1]):
        yield _divide(root, f"**/{name}", f"{{stem}}{suffix}")
    for end, suffix in product(_PHOTOS, MASK_SUFFIXES):
        yield _divide(root, f"**/*.{end}", f"{{stem}}{suffix}")


def _divide(root: Path, images: str, masks: str, train: str = "") -> dict[str, Any]:
    """Add where validation images come from: a folder beside `train`, or a share of all."""
    val = next((name for name in VAL_NAMES if (root / name).is_dir()), None)
    if not train or val is None:
        return {"images": images, "masks": masks, "val_fraction": 0.2}
    layout = {
        "images": images.replace(train, "{split}/"),
        "masks": masks.replace(train, "{split}/"),
    }
    return layout if val == "val" else {**layout, "val_split": val}


def _guess_images(items: list[Item]) -> tuple[dict[str, Any], list[str]]:
    arrays = [decode_image(item.image) for item in items[:20]]
    channels = Counter(1 if a.ndim == 2 else a.shape[2] for a in arrays).most_common(1)[0][0]
    is_photo = channels in (1, 3) or _is_opaque(arrays)
    found: dict[str, Any] = {} if is_photo else {"channels": channels}
    remarks = []
    if any(array.dtype != np.uint8 for array in arrays):
        high = max(float(array.max()) for array in arrays)
        low = min(float(array.min()) for array in arrays)
        top = 1.0 if high <= 1 else float(2 ** int(np.ceil(np.log2(high + 1))) - 1)
        found["value_range"] = [min(0.0, low), top]
        remarks.append(f"images hold values in {low:g}..{high:g}; value_range is a guess")
    if found:
        remarks.append("doctor prints mean and std of the bands for the network")
    return found, remarks


def _is_opaque(arrays: list[Any]) -> bool:
    return all(
        a.ndim == 3 and a.shape[2] == 4 and a.dtype == np.uint8 and (a[..., 3] == 255).all()
        for a in arrays
    )


def _guess_masks(items: list[Item]) -> tuple[dict[str, Any], list[str], list[str]]:
    ids: Counter[int] = Counter()
    colors: Counter[int] = Counter()
    for item in items:
        assert item.mask is not None
        mask = read_mask(item.mask)
        if mask.ndim == 3:
            colors.update(count_colors(mask))
        else:
            values, counts = np.unique(mask, return_counts=True)
            ids.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    if colors:
        return _guess_colors(colors)
    return _guess_ids(ids)


def _guess_colors(colors: Counter[int]) -> tuple[dict[str, Any], list[str], list[str]]:
    total = sum(colors.values())
    kept = [code for code, n in colors.most_common(_MAX_CLASSES) if n >= _MIN_SHARE * total]
    names = [f"class_{number}" for number in range(len(kept))]
    table = {name: unpack_color(code) for name, code in zip(names, kept, strict=True)}
    remarks = [
        "replace class_0, class_1, ... by names, in class_names and in colors: the commonest "
        "colour is first; ignore: [..] takes the colour of unlabelled pixels"
    ]
    if len(colors) > len(kept):
        remarks.append(
            f"{len(colors) - len(kept)} colours below 0.1 % were left out; doctor says where"
        )
    return {"colors": table}, names, remarks


def _guess_ids(ids: Counter[int]) -> tuple[dict[str, Any], list[str], list[str]]:
    values = sorted(ids)
    if values in ([0, 255], [0, 1]):
        found = {"value_map": {255: 1}} if 255 in values else {}
        return found, ["background", "foreground"], ["replace background and foreground by names"]
    labels = [value for value in values if value != IGNORE_INDEX]
    remarks = ["replace class_0, class_1, ... by names"]
    if IGNORE_INDEX in values:
        remarks.append(f"255 ({ids[IGNORE_INDEX] / ids.total():.1%} of the pixels) is ignored")
    if labels and max(labels) < _MAX_CLASSES:
        names = [f"class_{number}" for number in range(max(labels) + 1)]
        return {}, names, remarks
    names = [f"class_{number}" for number in range(len(labels))]
    table = {value: number for number, value in enumerate(labels) if value != number}
    return {"value_map": table}, names, [*remarks, "value_map leads raw values to class ids"]
