"""Say what a folder holds where no layout fits: kinds of files, or polygons to be drawn."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from seglab.data.errors import DataError
from seglab.data.sources.coco import read_json
from seglab.data.sources.listing import holds
from seglab.data.sources.reading import IMAGE_SUFFIXES
from seglab.sentences import listed

VAL_NAMES = ("val", "valid", "validation", "test")
_NOT_READ = (
    *(".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".dcm", ".nii", ".svg", ".exr", ".hdr"),
    *(".cr2", ".nef", ".dng", ".mat", ".h5", ".npz"),
)  # kinds of pictures that people have
_N_JSON = 20  # files that are opened to see what they are


class Polygons(NamedTuple):
    """Polygons of Labelme or COCO in a folder.

    Attributes:
        kind: "labelme" or "coco".
        source: Folder of Labelme's files, or COCO's file.
        images: Folder of the images.
        n_files: How many files the source has.
        n_others: How many JSON files lie elsewhere, as those of another split.
    """

    kind: str
    source: Path
    images: Path
    n_files: int
    n_others: int


def describe_stock(root: Path) -> str:
    """Name the kinds of image files below a folder, each with its number and an example."""
    kinds: defaultdict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            top = "/".join(path.relative_to(root).parts[:-1][:2])
            kinds[f"{top}/*{path.suffix}".lstrip("/")].append(path)
    others = Counter(p.suffix for p in root.rglob("*") if p.suffix.lower() in _NOT_READ)
    unread = "".join(
        f"; {number} {suffix} files are not read: save them as PNG, TIFF or NPY"
        for suffix, number in others.items()
    )
    if not kinds:
        return holds(root) + unread
    found = [f"{len(paths)} {kind} (as {paths[0].name})" for kind, paths in kinds.items()]
    if unread:
        return f"it holds {listed(found, 4)}{unread}"
    return f"it holds {listed(found, 4)}; say what belongs together with --images and --masks"


def describe_splits(root: Path) -> str:
    """What is wrong with the names of folders of splits, and how to mend it; "" if nothing is."""
    places = [root, *(path for path in root.iterdir() if path.is_dir())]
    names = {path.name: path for place in places for path in place.iterdir() if path.is_dir()}
    wrong = [n for n in names if n.lower() in ("train", *VAL_NAMES) and n != n.lower()]
    if wrong:
        pairs = listed([f"{names[name]} to {name.lower()}" for name in sorted(wrong)])
        return f"folders of splits are in small letters: rename {pairs}"
    ours = [name for name in VAL_NAMES if name in names]
    if ours and "train" not in names:
        return (
            f"there is {names[ours[0]]} and no folder train: images to train on are needed; rename "
            "the folder, or give --images and --masks to divide its images"
        )
    return ""


def find_polygons(root: Path) -> Polygons | None:
    """Find JSON files of Labelme or COCO below a folder."""
    files = sorted(root.rglob("*.json"))
    for path in files[:_N_JSON]:
        try:
            content = read_json(path)
        except DataError:
            continue
        if not isinstance(content, dict):
            continue
        if {"shapes", "imagePath"} <= content.keys():
            return _labelme(path, root, content["imagePath"], files)
        if {"images", "annotations", "categories"} <= content.keys():
            return _coco(path, root, content["images"], len(files) - 1)
    return None


def _labelme(path: Path, root: Path, image: object, files: Sequence[Path]) -> Polygons:
    """All of Labelme's files below the root, or of the first split."""
    first = path.relative_to(root).parts[0]
    own = [file for file in files if file.relative_to(root).parts[0] == first]
    own = own if first in ("train", *VAL_NAMES) else [*files]
    source = Path(os.path.commonpath([file.parent for file in own]))
    images = Path(os.path.normpath(path.parent / str(image).replace("\\", "/"))).parent
    images = source if images == path.parent else images
    return Polygons("labelme", source, images, len(own), len(files) - len(own))


def _coco(path: Path, root: Path, entries: object, n_others: int) -> Polygons | None:
    """The folder that COCO's names of files are relative to, by its first image."""
    try:
        name = entries[0]["file_name"]  # type: ignore[index]
        beside = path.parent / name  # Roboflow's exports; others keep images elsewhere
        found = beside if beside.is_file() else min(root.rglob(Path(name).name))
    except (LookupError, TypeError, ValueError):
        return None
    above = found.parents[len(Path(name).parts) - 1]
    return Polygons("coco", path, above, 1, n_others)
