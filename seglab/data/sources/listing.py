"""List image folders, and say what is missing in them."""

from itertools import islice
from pathlib import Path

from seglab.data.errors import DataError, MissingDataError
from seglab.data.sources.files import Item
from seglab.data.sources.masks import MASK_SUFFIXES
from seglab.data.sources.reading import IMAGE_SUFFIXES
from seglab.sentences import listed


def find_images(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by stem, sorted.

    Raises:
        DataError: If there are none, or two share a stem.
    """
    return _by_stem(folder, IMAGE_SUFFIXES)


def find_images_below(folder: Path) -> dict[str, Path]:
    """Return the images of a folder and its subfolders by path without suffix ("city/name").

    Raises:
        DataError: If there are none, or two differ in the suffix only.
    """
    return _by_stem(folder, IMAGE_SUFFIXES, below=True)


def find_masks(folder: Path) -> dict[str, Path]:
    """Return the masks of a folder by stem, sorted; raises as `find_images`."""
    return _by_stem(folder, MASK_SUFFIXES)


def _by_stem(folder: Path, suffixes: tuple[str, ...], below: bool = False) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in sorted(folder.rglob("*") if below else folder.iterdir()):
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in paths:
            raise DataError(f"{paths[stem]} and {path} have one stem; rename or remove one")
        paths[stem] = path
    if not paths:
        raise DataError(f"{folder} has no files ending in {', '.join(suffixes)}")
    return paths


def require_folder(folder: Path, needed: str) -> Path:
    """Return the folder, or say what is there instead.

    Args:
        folder: What must exist.
        needed: The layout the user must provide, for the error.

    Raises:
        MissingDataError: If there is no such folder; lists what its nearest parent holds.
    """
    if folder.is_dir():
        return folder
    raise MissingDataError(f"no folder {folder}; {needed}; {holds(folder)}")


def holds(folder: Path) -> str:
    """Say what a folder holds, or its nearest parent if it does not exist."""
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir()
    )
    names = sorted(path.name + "/" * path.is_dir() for path in islice(existing.iterdir(), 50))
    return f"{existing} holds {listed(names, 8) or 'nothing'}"


def pair(images: dict[str, Path], masks: dict[str, Path], folder: Path) -> list[Item]:
    """Put images and masks of equal stem together.

    Args:
        images: Image files by stem.
        masks: Mask files by stem.
        folder: Where the masks lie, for the error.

    Raises:
        DataError: If one is without the other; names the first three.
    """
    without_mask = [images[stem] for stem in images if stem not in masks]
    without_image = [masks[stem] for stem in masks if stem not in images]
    if without_mask:
        raise DataError(
            f"{len(without_mask)} image(s) have no mask of the same stem in {folder}: "
            f"{listed(without_mask)}; add the masks or move the images away"
        )
    if without_image:
        raise DataError(
            f"{len(without_image)} mask(s) have no image of the same stem: "
            f"{listed(without_image)}; add the images or move the masks away"
        )
    return [Item(path, masks[stem], stem) for stem, path in images.items()]
