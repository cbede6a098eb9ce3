"""Find the images that `predict --input` names: files, folders, patterns, lists, standard input."""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from seglab.data.sources.listing import find_images_below
from seglab.data.sources.reading import IMAGE_SUFFIXES


def find_inputs(
    given: Sequence[str], flat: bool = False, results: Sequence[Path] = ()
) -> dict[str, Path]:
    """Name every image once, in the order given.

    Args:
        given: Image files, folders (subfolders included), patterns such as "a/**/*.jpg", text files
            of one path per line (.txt), or "-", such a list on standard input.
        flat: Name images by their stem alone, not by their place below a folder.
        results: Folders of an earlier run's results; images in there are left out.

    Returns:
        Path of each image by the name of its result, without suffix.

    Raises:
        ValueError: There are none, or two would be written to one file.
        FileNotFoundError: A list is not there.
    """
    found: dict[str, Path] = {}
    without = {folder.resolve() for folder in results}
    for text in given:
        for name, path in _expand(text):
            if without and without & {*path.resolve().parents}:
                continue
            name = Path(name).name if flat else name
            other = found.setdefault(name, path)
            if other is not path and other.resolve() != path.resolve():
                raise ValueError(
                    f"{other} and {path} would both be written as {name}: predict them into"
                    " different outputs"
                )
    if not found:
        raise ValueError(f"--input {' '.join(given)} names no image")
    return found


def _expand(text: str) -> Iterator[tuple[str, Path]]:
    path = Path(text)
    if text == "-":
        yield from _listed(sys.stdin.read(), Path())
    elif path.is_dir():
        yield from find_images_below(path).items()
    elif path.suffix == ".txt":
        if not path.is_file():
            raise FileNotFoundError(f"list {path} does not exist: check the path.")
        yield from _listed(path.read_text(), path.parent)
    elif glob.has_magic(text) and not path.exists():
        matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        images = [match for match in matches if match.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise ValueError(f"--input {text} names no image: check the pattern")
        yield from ((match.stem, match) for match in images)
    else:
        yield path.stem, path


def _listed(content: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """One path a line; those that are not found from here are looked for beside the list."""
    for line in content.splitlines():
        if line.strip():
            path = Path(line.strip())
            path = path if _is_there(path) else folder / path
            yield path.stem, path


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no name at all: told with the other unreadable ones
        return False
