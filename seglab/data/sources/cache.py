"""Decoded files, memory-mapped: decoding a 2048 x 1024 PNG takes 200 times as long as a crop.

One ``.npy`` per pair of files: image and mask, as bytes. A training crop touches only the pages
it needs. A file is written when its pair is first read, under a name made of the paths, sizes and
times of the originals, so a changed original is never served from the cache.
"""

import hashlib
import os
from collections.abc import Sequence
from itertools import accumulate, takewhile
from pathlib import Path

import numpy as np

from seglab.data.errors import DataError
from seglab.data.sources.files import FileSource, Item
from seglab.data.sources.grouping import Grouped
from seglab.data.sources.labels import Labels
from seglab.data.sources.reading import read_shape
from seglab.data.sources.source import Pixels, Source

_CHANNELS = 4  # three of the image, one of the mask


class CachedFileSource(FileSource):
    """A `FileSource` that decodes each pair of files once.

    Args:
        items: The files, in order.
        labels: As in `FileSource`; applied after the cache, which holds raw masks.
        folder: Where to keep the decoded files; may be shared by data sets, runs and ranks.
        max_bytes: Bound; the first files that fit are cached, the rest decoded every time.
    """

    def __init__(
        self, items: Sequence[Item], labels: Labels, folder: str | Path, max_bytes: float
    ) -> None:
        super().__init__(items, labels)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = (_CHANNELS * np.prod(read_shape(item.image)) for item in self.items)
        self.n_cached = sum(1 for _ in takewhile(lambda size: size <= max_bytes, accumulate(sizes)))

    def decode(self, index: int) -> tuple[Pixels, Pixels]:
        """Return image and raw mask, from the cache if they are in it."""
        if index >= self.n_cached:
            return super().decode(index)
        path = self.folder / f"{_key(self.items[index])}.npy"
        if not path.exists():
            image, mask = super().decode(index)
            if image.shape[:2] != mask.shape:  # an error will be raised; nothing to keep
                return image, mask
            _write(path, image, mask)
        return _read(path)


def cache_files(source: Source, folder: str, max_bytes: float) -> Source:
    """Put a cache below a source of files (and below the grouping of its classes, if any).

    Raises:
        DataError: If the source does not read files.
    """
    if isinstance(source, Grouped):
        return Grouped(cache_files(source.source, folder, max_bytes), source.table)
    if not isinstance(source, FileSource):
        raise DataError("data.cache_folder is for images in files; leave it out for this data")
    return CachedFileSource(source.items, source.labels, folder, max_bytes)


def _key(item: Item) -> str:
    marks = []
    for path in (item.image, item.mask):
        if path is not None:
            status = path.stat()
            marks.append(f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}")
    return hashlib.blake2b("\n".join(marks).encode(), digest_size=16).hexdigest()


def _write(path: Path, image: Pixels, mask: Pixels) -> None:
    """Write under a name of this process, then rename: readers see a whole file or none."""
    height, width = mask.shape
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, np.concatenate([image.reshape(3 * height, width), mask]))
    part.replace(path)


def _read(path: Path) -> tuple[Pixels, Pixels]:
    both = np.load(path, mmap_mode="r")
    height = len(both) // _CHANNELS
    return both[: 3 * height].reshape(height, -1, 3), both[3 * height :]
