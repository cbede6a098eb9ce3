"""Turn what was counted into faults and notes, each with its cure."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from seglab.data.errors import DataError, LabelValueError
from seglab.data.inspection.examination import Examination
from seglab.data.sources.labels import unpack_color
from seglab.data.sources.source import IGNORE_INDEX
from seglab.sentences import listed

Splits = dict[str, list[Examination]]
_MIN_SHARE = 1e-4  # of the pixels: rarer colours are blended borders


def find_errors(
    split: str, samples: Iterable[Examination], class_names: Sequence[str]
) -> list[str]:
    """One fault per wrong label value, one per kind of other errors, however many files have it."""
    samples = list(samples)
    if any(sample.colors for sample in samples):
        others = [error for s in samples if not s.colors for error in s.errors]
        return [_describe_colors(split, samples, class_names), *_group(split, others)]
    errors = [error for sample in samples for error in sample.errors]
    wrong = [error for error in errors if isinstance(error, LabelValueError)]
    faults = _describe_values(split, wrong)
    proposal = _propose_map(samples, wrong, class_names)
    if proposal:
        faults[-1] += f"; if these are the missing classes in this order, set {proposal}"
    return faults + _group(split, [e for e in errors if not isinstance(e, LabelValueError)])


def _describe_values(split: str, wrong: Sequence[LabelValueError]) -> list[str]:
    n_pixels: Counter[int] = Counter()
    n_masks: Counter[int] = Counter()
    first: dict[int, LabelValueError] = {}
    for error in wrong:
        n_pixels.update(error.n_pixels)
        n_masks.update(error.n_pixels.keys())
        first |= {value: error for value in error.n_pixels if value not in first}
    return [
        f"{split}: label value {value} in {n_masks[value]} mask(s), {n_pixels[value]} pixels; "
        f"first: {first[value]}"
        for value in sorted(n_pixels)
    ]


def _propose_map(
    samples: Sequence[Examination], wrong: Sequence[LabelValueError], class_names: Sequence[str]
) -> str:
    """Pair raw values that are no class with classes that no mask holds, if there are as many."""
    values = sorted({value for error in wrong for value in error.n_pixels})
    counts = _counts(samples)
    absent = [label for label in range(len(class_names)) if not counts[label]]
    absent = [label for label in absent if label or len(absent) == len(values)]
    if not values or len(values) != len(absent):
        return ""
    pairs = ", ".join(f"{v}: {label}" for v, label in zip(values, absent, strict=True))
    return f"data.value_map: {{{pairs}}}"


def _describe_colors(split: str, samples: Sequence[Examination], class_names: Sequence[str]) -> str:
    colors: Counter[int] = Counter()
    for sample in samples:
        colors.update(sample.colors)
    total = sum(colors.values())
    kept = [(c, n / total) for c, n in colors.most_common() if n >= _MIN_SHARE * total]
    n_masks = sum(bool(sample.colors) for sample in samples)
    lines = [f"      NAME: {unpack_color(code)}  # {share:.2%}" for code, share in kept]
    rest = len(colors) - len(kept)
    more = f"\n      # and {rest} colours below {_MIN_SHARE:.2%} each" if rest else ""
    return (
        f"{split}: {n_masks} mask(s) hold colours, not class ids; write the names (of "
        f"{', '.join(class_names)} or ignore) into\n    colors:\n" + "\n".join(lines) + more
    )


def _group(split: str, errors: Sequence[DataError]) -> list[str]:
    """One line per kind of error: messages that differ in files and numbers only are of a kind."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for error in errors:
        kinds[re.sub(r"\S*[/\\]\S*|\d+", "", str(error))].append(str(error))
    return [
        f"{split}: {messages[0]}"
        + (f" [and {len(messages) - 1} more like it]" * (len(messages) > 1))
        for messages in kinds.values()
    ]


def find_leaks(splits: Splits) -> list[str]:
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


def find_absent_classes(
    samples: Sequence[Examination], class_names: Sequence[str], maps_values: bool
) -> list[str]:
    """Classes that no training mask holds: nothing would be learned about them."""
    counts = _counts(samples)
    absent = [label for label in range(len(class_names)) if not counts[label]]
    if not absent or not any(sample.shape for sample in samples):
        return []
    cure = "correct data.class_names, data.value_map or data.colors"
    if maps_values and counts[IGNORE_INDEX]:
        share = counts[IGNORE_INDEX] / counts.sum()
        cure = (
            f"255 means ignored and fills {share:.1%} of the pixels: if it is "
            f"{class_names[absent[0]]!r}, set data.value_map: {{255: {absent[0]}}}"
        )
    names = listed([class_names[label] for label in absent])
    return [f"train: {len(absent)} class(es) never occur in the masks: {names}; {cure}"]


def find_gaps(splits: Splits, class_names: Sequence[str]) -> list[str]:
    """Classes without a pixel, masks without a class, photographs that are turned."""
    notes = []
    for split, samples in splits.items():
        counts = _counts(samples)
        absent = [name for name, count in zip(class_names, counts, strict=False) if not count]
        if absent:
            notes.append(f"{split}: {len(absent)} class(es) without a pixel: {listed(absent)}")
        empty = [s.name for s in samples if s.shape and not s.counts[:IGNORE_INDEX].any()]
        if empty:
            notes.append(f"{split}: {len(empty)} mask(s) are wholly ignored: {listed(empty)}")
        turned = [sample.name for sample in samples if sample.is_turned]
        if turned:
            notes.append(
                f"{split}: {len(turned)} photograph(s) are turned as EXIF says; their masks must "
                f"be drawn on the turned picture: {listed(turned)}"
            )
    return notes


def describe_bands(samples: Sequence[Examination]) -> str:
    """Return the lines of a config that normalize every band by its own mean and deviation."""
    known = [(s.moments, s.shape) for s in samples if s.moments is not None and s.shape]
    if not known:
        return ""
    weights = np.array([height * width for _, (height, width) in known], np.float64)
    first, second = np.average([moments for moments, _ in known], axis=0, weights=weights)
    std = np.sqrt((second - first**2).clip(min=0))
    mean_text, std_text = ([round(float(value), 3) for value in values] for values in (first, std))
    return f"mean: {mean_text}\nstd: {std_text}"


def _counts(samples: Sequence[Examination]) -> NDArray[np.int64]:
    return sum((sample.counts for sample in samples), np.zeros(256, np.int64))
