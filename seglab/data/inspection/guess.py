"""Look at a folder of images and masks and guess the arguments of `FolderDataModule`."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from seglab.data.errors import DataError, MissingDataError, NoLayoutError, UnpairedError
from seglab.data.inspection.contents import Bands, guess_images, guess_masks
from seglab.data.inspection.readable import Readable
from seglab.data.inspection.stock import describe_stock
from seglab.data.sources.class_list import find_class_list
from seglab.data.sources.division import Division
from seglab.data.sources.files import Item
from seglab.data.sources.layouts import Entry, find_pairs, read_list
from seglab.data.sources.masks import MASK_SUFFIXES as MASK_FILES
from seglab.data.sources.reading import IMAGE_SUFFIXES, read_shape
from seglab.data.sources.split_lists import read_names, read_split_list
from seglab.sentences import listed

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages", "rgb", "inputs", "leftImg8bit")
MASK_FOLDERS = (
    "masks",
    "mask",
    "labels",
    "label",
    "annotations",
    "labelsTr",
    "gt",
    "gtFine",
    "targets",
    "SegmentationClass",
)
MASK_SUFFIXES = (
    "_mask",
    "_label",
    "_labels",
    "_gt",
    "_seg",
    "_segmentation",
    "_L",
    "_gtFine_labelTrainIds",  # Cityscapes: its 19 classes before all 34
    "_gtFine_labelIds",
    "",
)
SPLIT_MASKS = ("annot", "_labels", "_masks", "_mask", "_annotations", "_gt")  # beside `train`
VAL_NAMES = ("val", "valid", "validation", "test")
LIST_PLACES = ("", "splits", "lists", "ImageSets", "ImageSets/Segmentation")
LIST_SUFFIXES = (".txt", ".lst", ".csv")
FRACTIONS = (0.2, 0.25, 0.3, 0.4, 0.5, 0.1, 0.6, 0.7)
_N_EXAMINED = 2000
_LARGEST_LIST = 2**26  # bytes


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
    """

    arguments: dict[str, Any]
    class_names: list[str]
    shape: tuple[int, int]
    n_images: int
    bands: Bands | None = None
    remarks: list[str] = field(default_factory=list)


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
    masks, class_names, about_masks = guess_masks(some, find_class_list(some, root), readable)
    images, bands, about_images = guess_images(some, readable)
    shapes = np.array([shape for _, shape in readable.only(read_shape, some, "image")])
    height, width = (int(side) for side in np.median(shapes, axis=0))
    return Guess(
        {**layout, **images, **masks},
        class_names,
        (height, width),
        len(items),
        bands,
        [*readable.remarks(), *about_masks, *about_images, *remarks, *_unused(root, items)],
    )


def _find_layout(
    root: Path, patterns: tuple[str, str] | None
) -> tuple[dict[str, Any], list[Item], list[str]]:
    found = _guess_split_lists(root, patterns)
    if found is not None:
        return found
    if patterns is None:
        return _guess_list(root) or _guess_patterns(root, *guess_layout(root))
    images, masks = patterns
    items = find_pairs(root, images, masks, "train", "correct --images")
    return _guess_patterns(root, {"images": images, "masks": masks}, items)


def _unused(root: Path, items: Sequence[Item]) -> list[str]:
    """Image files of the folder that the layout leaves out."""
    used = {path for item in items for path in (item.image, item.mask)}
    found = (path for path in sorted(root.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES)
    rest = [path.relative_to(root).as_posix() for path in found if path not in used]
    return [f"{len(rest)} image file(s) are in no pair: {listed(rest)}"] if rest else []


def _guess_list(root: Path) -> tuple[dict[str, Any], list[Item], list[str]] | None:
    """A text or CSV file of images and masks in the folder, if there is exactly one."""
    if not root.is_dir():
        return None
    files = sorted([*root.glob("*.csv"), *root.glob("*.txt")])
    files = [path for path in files if path.is_file() and path.stat().st_size < _LARGEST_LIST]
    lists = {path: entries for path in files if (entries := _try_list(root, path))}
    if not lists:
        return None
    if len(lists) > 1:
        raise DataError(
            f"{root} holds several lists of images and masks ({listed([*lists])}); put them into "
            "one, with a third column of train and val"
        )
    ((path, entries),) = lists.items()
    items, found = [entry.item for entry in entries], {"list": str(path)}
    splits = {entry.split for entry in entries} - {None}
    if not splits:
        fraction, _, remarks = _guess_fraction(items)
        return found | fraction, items, remarks
    name = next((name for name in VAL_NAMES if name in splits), None)
    if name is None:
        raise DataError(f"{path} names the splits {sorted(map(str, splits))}, but none is val")
    return found | ({} if name == "val" else {"val_split": name}), items, []


def _try_list(root: Path, path: Path) -> list[Entry]:
    try:
        return read_list(root, path)
    except DataError:
        return []


def _find_split_lists(root: Path) -> tuple[str, str] | None:
    """Lists `train` and `val` of one folder: their path with ``{split}``, and val's own name."""
    for place, suffix, val in product(LIST_PLACES, LIST_SUFFIXES, VAL_NAMES):
        folder = root / place
        if (folder / f"train{suffix}").is_file() and (folder / f"{val}{suffix}").is_file():
            return (folder / f"{{split}}{suffix}").as_posix(), val
    return None


def _guess_split_lists(
    root: Path, patterns: tuple[str, str] | None
) -> tuple[dict[str, Any], list[Item], list[str]] | None:
    """Lists of the images of every split, and the layout that has them all."""
    found = _find_split_lists(root)
    if found is None:
        return None
    pattern, val = found
    paths = [Path(pattern.replace("{split}", split)) for split in ("train", val)]
    per_split = [read_names(path) for path in paths]
    names = {name for list_ in per_split for name in list_ or ()}
    layout: dict[str, str] = {}
    if names:
        images, masks = patterns or _patterns_of(root, names) or ("{split}", "")
        layout = {"images": images, "masks": masks}
    if "{split}" in layout.get("images", ""):
        return None
    images, masks = layout.get("images", ""), layout.get("masks", "")
    items = [
        item
        for split in ("train", val)
        for item in read_split_list(root, pattern, split, images, masks, "correct --images")
    ]
    arguments = {"list": pattern, **layout} | ({} if val == "val" else {"val_split": val})
    remark = f"the splits are those of {paths[0].name} and {paths[1].name} in {paths[0].parent}"
    return arguments, items, [remark]


def _patterns_of(root: Path, names: Collection[str]) -> tuple[str, str] | None:
    """The layout of listed images; None if folders of splits hold them already.

    Raises:
        NoLayoutError: If neither fits.
    """
    try:
        layout, _ = guess_layout(root, names)
    except NoLayoutError:
        try:
            if "{split}" in guess_layout(root)[0]["images"]:
                return None
        except DataError:
            pass  # the lists were to be followed, so theirs is the fault to tell
        raise
    return layout["images"], layout["masks"]


def _guess_patterns(
    root: Path, layout: dict[str, str], items: list[Item]
) -> tuple[dict[str, Any], list[Item], list[str]]:
    splits, more, remarks = _guess_splits(root, layout, items)
    lists = [
        path.relative_to(root).as_posix()
        for place, suffix, name in product(LIST_PLACES, LIST_SUFFIXES, ("train", *VAL_NAMES))
        if (path := root / place / f"{name}{suffix}").is_file()
    ]
    if lists:
        remarks = [*remarks, f"{listed(lists)} beside the images: not used for the splits"]
    return {**layout, **splits}, [*items, *more], remarks


def guess_layout(
    root: Path, names: Collection[str] | None = None
) -> tuple[dict[str, str], list[Item]]:
    """Return the first of the known patterns that pairs all images, and its training pairs.

    Args:
        root: Folder of images and masks.
        names: Pair these images only, as `find_pairs`.

    Raises:
        NoLayoutError: If none does; names the nearest, or what kinds of files there are.
    """
    if not root.is_dir():
        raise MissingDataError(f"no folder {root}; give the folder that images and masks are in")
    nearest: tuple[int, str] | None = None
    blended: tuple[str, UnpairedError] | None = None
    for images, masks in dict.fromkeys(_layouts(root)):
        found = _try_pairs(root, images, masks, names=names)
        if isinstance(found, list):
            return {"images": images, "masks": masks}, found
        unpaired = found if isinstance(found, UnpairedError) else UnpairedError("", 0, 1)
        if unpaired.blended and blended is None:
            blended = images, unpaired
        if found and unpaired.n_found and (nearest is None or unpaired.n_missing < nearest[0]):
            nearest = unpaired.n_missing, f"data.images: {images}, data.masks: {masks}, but {found}"
    if blended is not None and nearest is None:
        raise DataError(
            f"{root}: the masks of {blended[0]} are of a kind that cannot hold class ids, such as "
            f"{blended[1].blended}: save the masks as PNG"
        )
    why = f"nearest is {nearest[1]}" if nearest else describe_stock(root)
    listing = "" if names is None else f" that its lists of splits name ({listed(sorted(names))})"
    raise NoLayoutError(f"{root}: no layout fits all images and masks{listing}; {why}")


def _try_pairs(
    root: Path,
    images: str,
    masks: str,
    split: str = "train",
    names: Collection[str] | None = None,
) -> list[Item] | DataError | None:
    try:
        return find_pairs(root, images, masks, split, "", names)
    except MissingDataError:
        return None
    except DataError as error:
        return error


def _layouts(root: Path) -> Iterator[tuple[str, str]]:
    """Patterns of images and masks, the most telling first."""
    yield from _cityscapes(root)
    for images, masks, suffix in product(IMAGE_FOLDERS, MASK_FOLDERS, MASK_SUFFIXES):
        end = f"{{subfolder}}/{{stem}}{suffix}"
        if (root / "train" / images).is_dir() and (root / "train" / masks).is_dir():
            yield f"{{split}}/{images}/**/*", f"{{split}}/{masks}/{end}"
        if not (root / masks).is_dir():
            continue
        if (root / images / "train").is_dir():
            yield f"{images}/{{split}}/**/*", f"{masks}/{{split}}/{end}"
        elif (root / images).is_dir():
            yield f"{images}/**/*", f"{masks}/{end}"
    folders = [path.name for path in sorted(root.iterdir()) if path.is_dir()]
    for masks, suffix in product([name for name in MASK_FOLDERS if name in folders], MASK_SUFFIXES):
        end = f"{{subfolder}}/{{stem}}{suffix}"
        yield "*", f"{masks}/{{stem}}{suffix}"
        yield from ((f"{name}/**/*", f"{masks}/{end}") for name in folders if name != masks)
    for masks, suffix in product(SPLIT_MASKS, MASK_SUFFIXES):
        if (root / f"train{masks}").is_dir():
            yield "{split}/**/*", f"{{split}}{masks}/{{subfolder}}/{{stem}}{suffix}"
    for place in ("{split}/", "") if (root / "train").is_dir() else ("",):
        yield from _side_by_side(root, f"{place}**/*")


def _cityscapes(root: Path) -> Iterator[tuple[str, str]]:
    """Cityscapes' own tree, where images have a suffix too."""
    if (root / "leftImg8bit/train").is_dir():
        for kind in ("labelTrainIds", "labelIds"):
            mask = f"gtFine/{{split}}/{{subfolder}}/{{stem}}_gtFine_{kind}"
            yield "leftImg8bit/{split}/**/*_leftImg8bit.png", mask


def _side_by_side(root: Path, names: str) -> Iterator[tuple[str, str]]:
    """Patterns for images and masks in one folder."""
    found = {path.suffix for path in root.rglob("*") if path.is_file()}
    images = sorted(end for end in found if end.lower() in IMAGE_SUFFIXES)
    masks = sorted(end for end in found if end.lower() in MASK_FILES)
    for kind, end, suffix in product(("_img", "_image", "_rgb"), images, MASK_SUFFIXES):
        yield f"{names}{kind}{end}", f"{{stem}}{suffix}"
    for suffix in MASK_SUFFIXES[:-1]:
        yield names, f"{{stem}}{suffix}"
    for end, mask in product(images, masks):
        if end != mask:
            yield f"{names}{end}", f"{{stem}}{mask}"


def _guess_splits(
    root: Path, layout: dict[str, str], items: Sequence[Item]
) -> tuple[dict[str, Any], list[Item], list[str]]:
    """Where validation images come from: a folder beside `train`, or a share of all."""
    images, masks = layout["images"], layout["masks"]
    if "{split}" not in images:
        return _guess_fraction(items)
    place = root / images.split("{split}")[0]
    for name in (name for name in VAL_NAMES if (place / name).is_dir()):
        found = _try_pairs(root, images, masks, name)
        if isinstance(found, list):
            return ({} if name == "val" else {"val_split": name}), found, []
        if name != "test":  # test images often have no masks
            raise found or DataError(f"{place / name} holds no images where train has them")
    layout["images"], layout["masks"] = (
        text.replace("{split}", "train") for text in (images, masks)
    )
    return _guess_fraction(items)


def _guess_fraction(items: Sequence[Item]) -> tuple[dict[str, Any], list[Item], list[str]]:
    for fraction in FRACTIONS:
        try:
            chosen = Division(fraction).choose(items, "val")
            Division(fraction).choose(items, "train")
        except DataError:
            continue
        remark = (
            f"no validation images: {len(chosen)} of {len(items)} are taken, by their names; if "
            "images are frames of videos, keep each video on one side: group"
        )
        return {"val_fraction": fraction}, [], [remark]
    raise DataError(f"{len(items)} pair(s) cannot be divided into training and validation")
