"""Find lists of images and masks, or of the images of every split, in a folder."""

from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Any

from seglab.data.errors import DataError, NoLayoutError
from seglab.data.inspection.known_layouts import guess_layout
from seglab.data.inspection.known_splits import guess_fraction
from seglab.data.inspection.stock import VAL_NAMES
from seglab.data.sources.files import Item
from seglab.data.sources.layouts import Entry, read_list
from seglab.data.sources.split_lists import read_names, read_split_list
from seglab.sentences import listed

LIST_PLACES = ("", "splits", "lists", "ImageSets", "ImageSets/Segmentation")
LIST_SUFFIXES = (".txt", ".lst", ".csv")
_LARGEST_LIST = 2**26  # bytes


def guess_list(root: Path) -> tuple[dict[str, Any], list[Item], list[str]] | None:
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
        fraction, _, remarks = guess_fraction(items)
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


def guess_split_lists(
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
