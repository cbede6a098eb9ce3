"""Examine a data set before it costs a night: every file, every label value, every leak.

diagnosis = doctor(ADE20KDataModule("data"))
print(diagnosis)
raise SystemExit(bool(diagnosis.faults))
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seglab.data.base import SegmentationDataModule
from seglab.data.download import Progress, silent
from seglab.data.errors import DataError, LabelValueError, MissingDataError
from seglab.data.inspection.diagnosis import Diagnosis, SplitSummary
from seglab.data.sources.files import FileSource, Item
from seglab.data.sources.grouping import Grouped
from seglab.data.sources.source import IGNORE_INDEX, Shape, Source
from seglab.sentences import listed


class Examination(NamedTuple):
    """What one sample turned out to be."""

    name: str
    shape: Shape | None  # None: unreadable
    counts: NDArray[np.int64]  # pixels per class id, (256,)
    errors: tuple[DataError, ...]
    digest: bytes | None  # of the image file


@dataclass
class _Findings:
    """Faults and notes as they come up."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def doctor(
    data: SegmentationDataModule, *, num_workers: int = 8, progress: Progress = silent
) -> Diagnosis:
    """Read every image and mask of every split and say what is wrong.

    Checks that files decode whole, that images and masks agree in size, that mask values are
    classes, and that no image file is in two splits; counts class pixels. Needs no `setup`.

    Args:
        data: The data module; for a downloaded set, after `prepare`.
        num_workers: Threads (decoders release Python's lock).
        progress: Called with (split, samples done, samples in all).

    Returns:
        Tables and a verdict as text; `.faults` is empty for a sound data set.

    >>> from seglab.data import ScenesDataModule
    >>> diagnosis = doctor(ScenesDataModule(size=32, train_length=20, val_length=20))
    >>> diagnosis.faults, diagnosis.splits[0].n_images
    ((), 20)
    """
    found = _Findings()
    splits: dict[str, list[Examination]] = {}
    for split in ("train", "val", "test"):
        source = _make_source(data, split, found)
        if source is not None:
            splits[split] = _examine_all(source, split, num_workers, progress)
            found.faults += _describe_errors(split, splits[split])
    found.faults += _find_leaks(splits)
    found.notes += _find_gaps(splits, data.class_names)
    return Diagnosis(
        data.class_names,
        tuple(_summarize(name, samples, data.num_classes) for name, samples in splits.items()),
        tuple(found.faults),
        tuple(found.notes),
    )


def _make_source(data: SegmentationDataModule, split: str, found: _Findings) -> Source | None:
    """List a split; a test split may be missing, or be the validation split again."""
    try:
        source = data.open_source(split)
        if split == "test" and _is_same(source, data.open_source("val")):
            return None
    except MissingDataError as error:
        if split != "test":
            found.faults.append(f"{split}: {error}")
        return None
    except DataError as error:
        found.faults.append(f"{split}: {error}")
        return None
    return source


def _is_same(source: Source, other: Source) -> bool:
    return bool(_items(source)) and _items(source) == _items(other)


def _items(source: Source) -> list[Item]:
    """The files below a source, none if it makes its samples up."""
    while isinstance(source, Grouped):
        source = source.source
    return source.items if isinstance(source, FileSource) else []


def _examine_all(
    source: Source, split: str, num_workers: int, progress: Progress
) -> list[Examination]:
    samples = []
    with ThreadPoolExecutor(num_workers) as pool:
        for sample in pool.map(lambda index: _examine(source, index), range(len(source))):
            samples.append(sample)
            progress(split, len(samples), len(source))
    return samples


def _examine(source: Source, index: int) -> Examination:
    errors: list[DataError] = []
    shape, counts = None, np.zeros(256, np.int64)
    try:
        image, mask = source.read(index)
        shape, counts = image.shape[:2], np.bincount(mask.ravel(), minlength=256)
    except DataError as error:
        errors.append(error)
        errors += _also_wrong_with_mask(source, index, error)
    return Examination(source.name(index), shape, counts, tuple(errors), _digest(source, index))


def _also_wrong_with_mask(source: Source, index: int, known: DataError) -> list[DataError]:
    try:
        source.read_mask(index)
    except DataError as error:
        return [error] if str(error) != str(known) else []
    return []


def _digest(source: Source, index: int) -> bytes | None:
    items = _items(source)
    if not items:
        return None
    try:
        content = items[index].image.read_bytes()
    except OSError:
        return None
    return hashlib.blake2b(content, digest_size=16).digest()


def _describe_errors(split: str, samples: Iterable[Examination]) -> list[str]:
    """One fault per wrong label value, however many masks have it; one per other error."""
    errors = [error for sample in samples for error in sample.errors]
    wrong = [error for error in errors if isinstance(error, LabelValueError)]
    n_pixels: Counter[int] = Counter()
    first: dict[int, LabelValueError] = {}
    n_masks: Counter[int] = Counter()
    for error in wrong:
        n_pixels.update(error.n_pixels)
        n_masks.update(error.n_pixels.keys())
        first |= {value: error for value in error.n_pixels if value not in first}
    return [
        f"{split}: label value {value} in {n_masks[value]} mask(s), {n_pixels[value]} pixels; "
        f"first: {first[value]}"
        for value in sorted(n_pixels)
    ] + [f"{split}: {error}" for error in errors if not isinstance(error, LabelValueError)]


def _find_leaks(splits: dict[str, list[Examination]]) -> list[str]:
    """Image files with equal bytes in two splits."""
    homes: defaultdict[bytes, dict[str, str]] = defaultdict(dict)
    for split, samples in splits.items():
        for sample in samples:
            if sample.digest is not None:
                homes[sample.digest].setdefault(split, sample.name)
    leaks: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for names in homes.values():
        if len(names) > 1:
            leaks[tuple(names)].append(" = ".join(names.values()))
    return [
        f"{len(pairs)} image(s) are both in {' and in '.join(where)}: "
        f"{listed(pairs)}; evaluate on images that were not trained on"
        for where, pairs in leaks.items()
    ]


def _find_gaps(splits: dict[str, list[Examination]], class_names: Sequence[str]) -> list[str]:
    """Classes without a pixel, and masks without a class."""
    notes = []
    for split, samples in splits.items():
        counts = sum((sample.counts for sample in samples), np.zeros(256, np.int64))
        absent = [name for name, count in zip(class_names, counts, strict=False) if not count]
        if absent:
            notes.append(f"{split}: {len(absent)} class(es) without a pixel: {listed(absent)}")
        empty = [s.name for s in samples if s.shape and not s.counts[:IGNORE_INDEX].any()]
        if empty:
            notes.append(f"{split}: {len(empty)} mask(s) are wholly ignored: {listed(empty)}")
    return notes


def _summarize(name: str, samples: Sequence[Examination], n_classes: int) -> SplitSummary:
    shapes = Counter(sample.shape for sample in samples if sample.shape)
    counts = np.stack([sample.counts for sample in samples])
    return SplitSummary(
        name,
        n_images=len(samples),
        n_unreadable=sum(sample.shape is None for sample in samples),
        shapes=dict(shapes.most_common()),
        n_ignored=int(counts[:, IGNORE_INDEX].sum()),
        n_pixels=tuple(counts[:, :n_classes].sum(0).tolist()),
        n_images_with=tuple((counts[:, :n_classes] > 0).sum(0).tolist()),
    )
