"""Text files that divide images into splits: one per split, with a name or a pair per line."""

from collections import Counter
from pathlib import Path

from seglab.data.errors import DataError, MissingDataError
from seglab.data.sources.files import Item
from seglab.data.sources.layouts import find_pairs, read_list
from seglab.data.sources.reading import IMAGE_SUFFIXES

_FIELD = "{split}"


def read_split_list(
    root: Path, pattern: str, split: str, images: str, masks: str, cure: str
) -> list[Item]:
    """Return the pairs of a split that its list names.

    Args:
        root: Folder that the lists' paths and the patterns are relative to.
        pattern: Path of the lists, with ``{split}`` in it.
        split: Which one.
        images: Pattern of the images, for lists of names.
        masks: Pattern of an image's mask, for lists of names.
        cure: What to do where there are no images, for the error.

    Raises:
        MissingDataError: If there is no such list.
        DataError: If a name is no image, or an image has no mask.
    """
    path = Path(pattern.replace(_FIELD, split))
    names = read_names(path)
    if names is None:
        return [entry.item for entry in read_list(root, path)]
    try:
        return find_pairs(root, images, masks, split, cure, names)
    except MissingDataError as error:
        raise MissingDataError(f"data.list {path}: {error}") from error
    except DataError as error:
        raise DataError(f"data.list {path}: {error}") from error


def read_names(path: Path) -> list[str] | None:
    """Return the names of images in a list, without suffix; None if its lines hold more than one.

    Raises:
        MissingDataError: If there is no such file.
        DataError: If it is no text, empty, or names an image twice.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise MissingDataError(f"data.list: no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read data.list {path}: {error}") from error
    if not lines:
        raise DataError(f"data.list {path} is empty; write one name of an image per line")
    if any(map(_is_pair, lines)):
        return None
    names = [_without_suffix(line) for line in lines]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"data.list {path} names {twice[0]!r} twice; remove one of the lines")
    return names


def _is_pair(line: str) -> bool:
    """Whether a line holds an image and its mask; a name may hold blanks."""
    if any(sign in line for sign in ",;\t"):
        return True
    first, *more = line.split()
    return bool(more) and Path(first).suffix.lower() in IMAGE_SUFFIXES


def _without_suffix(line: str) -> str:
    name = line.replace("\\", "/").removeprefix("./").lstrip("/")
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name
