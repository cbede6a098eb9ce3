"""Decoded files, memory-mapped: decoding a 2048 x 1024 PNG takes 200 times as long as a crop.

Two ``.npy`` per pair of files: image and raw mask. A training crop touches only the pages
it needs. A file is written when its pair is first read, under a name made of the paths, sizes and
times of the originals, so a changed original is never served from the cache.
"""

import hashlib
import os
from itertools import accumulate, takewhile
from pathlib import Path

import numpy as np

from seglab.data.errors import DataError
from seglab.data.sources.files import FileSource, Item
from seglab.data.sources.grouping import Grouped
from seglab.data.sources.reading import Array, ImageFormat, read_shape
from seglab.data.sources.source import Pixels, Source


class CachedFileSource(FileSource):
    """A `FileSource` that decodes each pair of files once.

    Args:
        source: The files; labels are applied after the cache, which holds raw masks.
        folder: Where to keep the decoded files; may be shared by data sets, runs and ranks.
        max_bytes: Bound; the first files that fit are cached, the rest decoded every time.
    """

    def __init__(self, source: FileSource, folder: str | Path, max_bytes: float) -> None:
        super().__init__(source.items, source.labels, source.image_format)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        width = 1 if self.image_format.value_range is None else 4
        pixel = self.image_format.channels * width + 1
        sizes = (pixel * np.prod(read_shape(item.image)) for item in self.items)
        self.n_cached = sum(1 for _ in takewhile(lambda size: size <= max_bytes, accumulate(sizes)))

    def decode(self, index: int) -> tuple[Pixels, Array]:
        """Return image and raw mask, from the cache if they are in it."""
        if index >= self.n_cached:
            return super().decode(index)
        key = self.folder / _key(self.items[index], self.image_format)
        paths = [key.with_suffix(suffix) for suffix in (".image.npy", ".mask.npy")]
        if not all(path.exists() for path in paths):
            image, mask = super().decode(index)
            if image.shape[:2] != mask.shape[:2]:  # an error will be raised; nothing to keep
                return image, mask
            for path, array in zip(paths, (image, mask), strict=True):
                _write(path, array)
        image, mask = (np.load(path, mmap_mode="r") for path in paths)
        return image, mask


def cache_files(source: Source, folder: str, max_bytes: float) -> Source:
    """Put a cache below a source of files (and below the grouping of its classes, if any).

    Raises:
        DataError: If the source does not read files.
    """
    if isinstance(source, Grouped):
        return Grouped(cache_files(source.source, folder, max_bytes), source.table)
    if not isinstance(source, FileSource):
        raise DataError("data.cache_folder is for images in files; leave it out for this data")
    return CachedFileSource(source, folder, max_bytes)


def _key(item: Item, image_format: ImageFormat) -> str:
    marks = [str(image_format)]
    for path in (item.image, item.mask):
        if path is not None:
            status = path.stat()
            marks.append(f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}")
    return hashlib.blake2b("\n".join(marks).encode(), digest_size=16).hexdigest()


def _write(path: Path, array: Array) -> None:
    """Write under a name of this process, then rename: readers see a whole file or none."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        np.save(file, array)
    part.replace(path)
