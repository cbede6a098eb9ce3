"""Read every sample of a split and keep what can be counted."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seglab.data.download import Progress
from seglab.data.errors import DataError
from seglab.data.sources.files import FileSource, Item
from seglab.data.sources.labels import LabelTable, count_colors
from seglab.data.sources.masks import read_mask
from seglab.data.sources.reading import has_orientation
from seglab.data.sources.source import Pixels, Shape, Source, SourceWrapper

_N_COLORS = 64  # kept per mask; blended borders make thousands


class Examination(NamedTuple):
    """What one sample turned out to be."""

    name: str
    shape: Shape | None  # None: unreadable
    counts: NDArray[np.int64]  # pixels per class id, (256,)
    errors: tuple[DataError, ...]
    digest: bytes | None  # of the image file
    is_turned: bool  # by its EXIF orientation
    moments: NDArray[np.float64] | None  # per band: mean, mean of squares, (2, C)
    colors: Counter[int]  # pixels per packed colour, of masks that hold colours and should not


def examine_all(
    source: Source, split: str, num_workers: int, progress: Progress
) -> list[Examination]:
    """Read every sample of a source in threads (decoders release Python's lock)."""
    samples = []
    with ThreadPoolExecutor(num_workers) as pool:
        for sample in pool.map(lambda index: _examine(source, index), range(len(source))):
            samples.append(sample)
            progress(split, len(samples), len(source))
    return samples


def files_of(source: Source) -> FileSource | None:
    """Return the files below a source; None if it makes its samples up."""
    while isinstance(source, SourceWrapper):
        source = source.source
    return source if isinstance(source, FileSource) else None


def _examine(source: Source, index: int) -> Examination:
    errors: list[DataError] = []
    shape, counts, moments = None, np.zeros(256, np.int64), None
    try:
        image, mask = source.read(index)
        shape, counts = image.shape[:2], np.bincount(mask.ravel(), minlength=256)
        moments = _moments(image)
    except DataError as error:
        errors.append(error)
        errors += _also_wrong_with_mask(source, index, error)
    files = files_of(source)
    item = files.items[index] if files else None
    return Examination(
        source.name(index),
        shape,
        counts,
        tuple(errors),
        _digest(item),
        bool(item and has_orientation(item.image)),
        moments,
        _unexpected_colors(files, item) if errors else Counter(),
    )


def _moments(image: Pixels) -> NDArray[np.float64]:
    flat = image.reshape(-1, image.shape[2]).astype(np.float32)
    return np.stack([flat.mean(0, np.float64), np.square(flat).mean(0, np.float64)])


def _also_wrong_with_mask(source: Source, index: int, known: DataError) -> list[DataError]:
    try:
        source.read_mask(index)
    except DataError as error:
        return [error] if str(error) != str(known) else []
    return []


def _unexpected_colors(files: FileSource | None, item: Item | None) -> Counter[int]:
    if files is None or item is None or item.mask is None:
        return Counter()
    if not isinstance(files.labels, LabelTable):
        return Counter()
    try:
        mask = read_mask(item.mask)
    except DataError:
        return Counter()  # said elsewhere
    return Counter(dict(count_colors(mask).most_common(_N_COLORS))) if mask.ndim == 3 else Counter()


def _digest(item: Item | None) -> bytes | None:
    if item is None:
        return None
    try:
        content = item.image.read_bytes()
    except OSError:
        return None
    return hashlib.blake2b(content, digest_size=16).digest()
