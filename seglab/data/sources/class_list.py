"""The names of the classes, in a text file beside masks that were made from polygons."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from seglab.data.errors import DataError
from seglab.data.sources.files import Item

CLASS_LIST = "classes.txt"


class ClassList(NamedTuple):
    """Names of the classes, by id, and the file that they were read from."""

    names: tuple[str, ...]
    path: Path


def write_class_list(folder: Path, names: Sequence[str]) -> None:
    """Write one name per line, by id."""
    (folder / CLASS_LIST).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def find_class_list(items: Iterable[Item], root: Path) -> ClassList | None:
    """Return the list of classes that lies in the folders of masks, or above them in `root`.

    Raises:
        DataError: If two lists differ: equal ids would mean different classes.
    """
    found: ClassList | None = None
    for path in dict.fromkeys(_places(items, root)):
        if not path.is_file():
            continue
        names = _read(path)
        if found is not None and found.names != names:
            raise DataError(
                f"{found.path} and {path} list other classes, so equal ids would mean different "
                "ones: prepare all splits with the same --classes"
            )
        found = found or ClassList(names, path)
    return found


def refuse_other_classes(items: Iterable[Item], root: Path, class_names: Sequence[str]) -> None:
    """Compare the class names of a config with the list beside the masks, if there is one.

    Raises:
        DataError: If they differ.
    """
    found = find_class_list(items, root)
    if found is not None and found.names != tuple(class_names):
        raise DataError(
            f"data.class_names are {list(class_names)}, but {found.path} says that the masks hold "
            f"{list(found.names)}; write the same names in the same order into both"
        )


def _read(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"class list {path} is no text in UTF-8 ({error}); save it anew") from error
    return tuple(line.strip() for line in lines if line.strip())


def _places(items: Iterable[Item], root: Path) -> Iterator[Path]:
    for folder in dict.fromkeys(item.mask.parent for item in items if item.mask):
        while folder.is_relative_to(root):
            yield folder / CLASS_LIST
            if folder == root:
                break
            folder = folder.parent
