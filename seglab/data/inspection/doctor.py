"""Examine a data set before it costs a night: every file, every label value, every leak.

diagnosis = doctor(ADE20KDataModule("data"))
print(diagnosis)
raise SystemExit(bool(diagnosis.faults))
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from seglab.data.base import SegmentationDataModule
from seglab.data.download import Progress, silent
from seglab.data.errors import DataError, MissingDataError
from seglab.data.inspection.diagnosis import Diagnosis, SplitSummary
from seglab.data.inspection.examination import Examination, examine_all, files_of
from seglab.data.inspection.findings import (
    describe_bands,
    find_absent_classes,
    find_errors,
    find_gaps,
    find_leaks,
)
from seglab.data.sources.labels import LabelTable
from seglab.data.sources.reading import ImageFormat
from seglab.data.sources.source import IGNORE_INDEX, Source


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
    faults: list[str] = []
    splits: dict[str, list[Examination]] = {}
    for split in ("train", "val", "test"):
        source = _make_source(data, split, faults)
        if source is not None:
            splits[split] = examine_all(source, split, num_workers, progress)
            faults += find_errors(split, splits[split], data.class_names)
    faults += find_leaks(splits)
    notes = find_gaps(splits, data.class_names)
    train = splits.get("train", [])
    if data.has_own_classes and not any(sample.colors for sample in train):
        maps_values = isinstance(getattr(data, "labels", None), LabelTable)
        faults += find_absent_classes(train, data.class_names, maps_values)
        notes = [
            note for note in notes if not note.startswith("train") or "without a pixel" not in note
        ]
    return Diagnosis(
        data.class_names,
        tuple(_summarize(name, samples, data.num_classes) for name, samples in splits.items()),
        tuple(faults),
        tuple(notes),
        describe_bands(train) if data.image_format != ImageFormat() else "",
    )


def _make_source(data: SegmentationDataModule, split: str, faults: list[str]) -> Source | None:
    """List a split; a test split may be missing, or be the validation split again."""
    try:
        source = data.open_source(split)
        if split == "test" and _is_same(source, data.open_source("val")):
            return None
    except MissingDataError as error:
        if split != "test":
            faults.append(f"{split}: {error}")
        return None
    except DataError as error:
        faults.append(f"{split}: {error}")
        return None
    return source


def _is_same(source: Source, other: Source) -> bool:
    files, others = files_of(source), files_of(other)
    return files is not None and others is not None and files.items == others.items


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
