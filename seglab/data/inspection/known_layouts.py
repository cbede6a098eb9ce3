"""Patterns of folders and names that people keep images and masks in, and which of them fits."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import product
from pathlib import Path

from seglab.data.errors import DataError, MissingDataError, NoLayoutError, UnpairedError
from seglab.data.inspection.stock import VAL_NAMES, describe_splits, describe_stock
from seglab.data.sources.files import Item
from seglab.data.sources.layouts import find_pairs
from seglab.data.sources.masks import MASK_SUFFIXES as MASK_FILES
from seglab.data.sources.reading import IMAGE_SUFFIXES
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
    "_Mask",
    "_MASK",
    "-mask",
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
        found = try_pairs(root, images, masks, names=names)
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
    stock = "; ".join(filter(None, (describe_splits(root), describe_stock(root))))
    why = f"nearest is {nearest[1]}" if nearest else stock
    listing = "" if names is None else f" that its lists of splits name ({listed(sorted(names))})"
    raise NoLayoutError(
        f"{root}: no layout fits all images and masks{listing}; {why}", nearest is not None
    )


def try_pairs(
    root: Path,
    images: str,
    masks: str,
    split: str = "train",
    names: Collection[str] | None = None,
) -> list[Item] | DataError | None:
    """Return the pairs that patterns find, what is wrong with them, or None if there are none."""
    try:
        return find_pairs(root, images, masks, split, "", names)
    except MissingDataError:
        return None
    except DataError as error:
        return error


def _layouts(root: Path) -> Iterator[tuple[str, str]]:
    """Patterns of images and masks, the most telling first."""
    yield from _cityscapes(root)
    own = _as_written(root)
    for images, masks, suffix in product(own(IMAGE_FOLDERS), own(MASK_FOLDERS), MASK_SUFFIXES):
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
    for masks, suffix in product(
        [name for name in own(MASK_FOLDERS) if name in folders], MASK_SUFFIXES
    ):
        end = f"{{subfolder}}/{{stem}}{suffix}"
        yield "*", f"{masks}/{{stem}}{suffix}"
        yield from ((f"{name}/**/*", f"{masks}/{end}") for name in folders if name != masks)
    for masks, suffix in product(SPLIT_MASKS, MASK_SUFFIXES):
        if (root / f"train{masks}").is_dir():
            yield "{split}/**/*", f"{{split}}{masks}/{{subfolder}}/{{stem}}{suffix}"
    for place in ("{split}/", "") if (root / "train").is_dir() else ("",):
        yield from _side_by_side(root, f"{place}**/*")


def _as_written(root: Path) -> Callable[[Sequence[str]], list[str]]:
    """Known names of folders in the letters, capital or not, that the root and its splits use."""
    places = [root, *(root / name for name in ("train", *VAL_NAMES))]
    found = [path.name for place in places if place.is_dir() for path in place.iterdir()]

    def as_written(known: Sequence[str]) -> list[str]:
        spelled = {name.lower(): name for name in reversed(found)}
        return [name if name in found else spelled.get(name.lower(), name) for name in known]

    return as_written


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
