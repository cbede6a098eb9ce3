"""Read the files of pairs, and note those that cannot be read instead of stopping."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from seglab.data.errors import UnreadableError
from seglab.data.sources.files import Item
from seglab.sentences import listed

T = TypeVar("T")


class Readable:
    """Reader of those files that can be read; the others are kept in `broken`.

    Attributes:
        broken: What is wrong with each file that could not be read.
    """

    def __init__(self) -> None:
        self.broken: dict[Path, UnreadableError] = {}

    def only(
        self, read: Callable[[Path], T], items: Iterable[Item], what: Literal["image", "mask"]
    ) -> Iterator[tuple[Path, T]]:
        """Read the images or masks of pairs.

        Yields:
            Path and content of every file that can be read.

        Raises:
            UnreadableError: If none can; what is wrong with the last.
        """
        n_read, last = 0, None
        for item in items:
            path = item.image if what == "image" else item.mask
            assert path is not None  # pairs have masks
            try:
                content = read(path)
            except UnreadableError as error:
                self.broken[path] = last = error
                continue
            n_read += 1
            yield path, content
        if last is not None and not n_read:
            raise last

    def remarks(self) -> list[str]:
        """Say which files are broken, if any are."""
        if not self.broken:
            return []
        return [
            f"{len(self.broken)} file(s) cannot be read and stop a training: "
            f"{listed([*self.broken])}; replace them or remove the pairs (doctor names all)"
        ]
