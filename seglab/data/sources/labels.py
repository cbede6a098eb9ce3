"""Map what mask files hold, ids or colours, to class ids."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seglab.data.errors import DataError, LabelValueError
from seglab.data.sources.reading import Array
from seglab.data.sources.source import IGNORE_INDEX, Pixels
from seglab.sentences import listed

Labels = Callable[[Array, Path], Pixels]  # raw mask and its path -> class ids

MAX_CLASSES = 254
IGNORE_NAME = "ignore"  # in `colors`: the colours of no class
_NOT_ALLOWED = 254  # mark of raw values that are neither a class nor ignored
_N_VALUES = 2**16
_N_SHOWN = 8


def check_class_count(n_classes: int) -> None:
    """Refuse a number of classes that 8-bit masks cannot hold, or that leaves nothing to learn.

    Raises:
        ValueError: If there are none, one, or more than 254.
    """
    if n_classes < 2:
        what = "one class leaves" if n_classes else "data.class_names is empty, which leaves"
        raise ValueError(
            f"{what} nothing to tell apart; name the rest too, for instance "
            "data.class_names: [background, NAME]"
        )
    if n_classes > MAX_CLASSES:
        raise ValueError(f"{n_classes} classes do not fit into 8-bit masks; 2 to {MAX_CLASSES} do")


class LabelTable:
    """Raw mask values to class ids, by one look-up.

    Args:
        n_classes: Values 0 .. n_classes - 1 and 255 stand for themselves.
        value_map: What other raw values (0..65535) become, and these, if listed: an id or 255. A
            map that leads to every class is complete: then no value but 255 stands for itself.
        cure: What to do about values that are not allowed; by default, add them to the map.

    Raises:
        ValueError: If there are more than 254 classes or the map leads to something else.

    >>> table = LabelTable(2, {700: 1})
    >>> table(np.uint16([[0, 700, 255]]), Path("a.png")).tolist()
    [[0, 1, 255]]
    """

    def __init__(
        self, n_classes: int, value_map: Mapping[int, int] | None = None, cure: str = ""
    ) -> None:
        if n_classes > MAX_CLASSES:
            raise ValueError(f"{n_classes} classes do not fit into 8-bit masks; at most 254 do")
        self.n_classes = n_classes
        self.value_map = dict(value_map or {})
        self.cure = cure
        self.table = np.full(_N_VALUES, _NOT_ALLOWED, np.uint8)
        if not {*range(n_classes)} <= {*self.value_map.values()}:
            self.table[:n_classes] = np.arange(n_classes)
        self.table[IGNORE_INDEX] = IGNORE_INDEX
        for raw, label in self.value_map.items():
            if not 0 <= raw < _N_VALUES or not (0 <= label < n_classes or label == IGNORE_INDEX):
                raise ValueError(
                    f"value_map {{{raw}: {label}}} must lead from 0..65535 to a class id "
                    f"0..{n_classes - 1} or to {IGNORE_INDEX} (ignore)"
                )
            self.table[raw] = label

    def __call__(self, mask: Array, path: Path) -> Pixels:
        """Map a raw mask (H, W); the path is for the error.

        Raises:
            LabelValueError: If a raw value is neither a class, nor mapped, nor 255.
            DataError: If the mask holds colours.
        """
        import cv2

        if mask.ndim == 3:
            raise DataError(
                f"mask {path} holds colours, not class ids; name them: data.colors: "
                "{road: [128, 64, 128], ...} (`doctor` lists those it finds)"
            )
        mapped: Pixels
        if mask.dtype == np.uint8:
            mapped = cv2.LUT(mask, self.table[:256])  # 15 times as fast as indexing
        else:
            outside = (mask < 0) | (mask >= _N_VALUES)
            mapped = np.where(outside, np.uint8(_NOT_ALLOWED), self.table[mask.clip(0, 65535)])
        if (mapped == _NOT_ALLOWED).any():
            raise self._error(mask, mapped, path)
        return mapped

    def _error(self, mask: Array, mapped: Pixels, path: Path) -> LabelValueError:
        values, counts = np.unique(mask[mapped == _NOT_ALLOWED], return_counts=True)
        seen = [f"value {v} ({n} pixels)" for v, n in zip(values, counts, strict=True)]
        cure = self.cure or (
            f"add the value to data.value_map (for instance {{{values[0]}: 255}} to ignore it) "
            "or to class_names"
        )
        return LabelValueError(
            f"mask {path} has {listed(seen, _N_SHOWN)}; allowed are {self._allowed()}: {cure}",
            dict(zip(values.tolist(), counts.tolist(), strict=True)),
        )

    def _allowed(self) -> str:
        """The raw values that are not refused, as ranges."""
        raw = np.flatnonzero(self.table != _NOT_ALLOWED)
        runs = np.split(raw, np.flatnonzero(np.diff(raw) > 1) + 1)
        return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


class ColorTable:
    """RGB colours of mask files to class ids.

    Args:
        class_names: Names of the classes, by id.
        colors: RGB triple, or list of triples, of every class; those of "ignore" become 255.

    Raises:
        ValueError: If a class has no colour, a name is no class, or a colour is given twice.

    >>> table = ColorTable(["road", "car"], {"road": [128, 64, 128], "car": [0, 0, 142]})
    >>> table(np.uint8([[[0, 0, 142], [128, 64, 128]]]), Path("a.png")).tolist()
    [[1, 0]]
    """

    def __init__(
        self,
        class_names: Sequence[str],
        colors: Mapping[str, Sequence[int] | Sequence[Sequence[int]]],
    ) -> None:
        missing = [name for name in class_names if name not in colors]
        unknown = [name for name in colors if name not in (*class_names, IGNORE_NAME)]
        if missing or unknown:
            raise ValueError(
                f"data.colors needs one entry per class (and {IGNORE_NAME!r} for colours of none): "
                f"missing {missing}, unknown {unknown}"
            )
        labels: dict[int, int] = {}
        for name, given in colors.items():
            label = IGNORE_INDEX if name == IGNORE_NAME else [*class_names].index(name)
            for color in _triples(name, given):
                code = _pack(np.array(color, np.uint8)).item()
                if labels.setdefault(code, label) != label:
                    raise ValueError(f"data.colors gives {list(color)} to two classes")
        self.codes = np.array(sorted(labels), np.int64)
        self.labels = np.array([labels[code] for code in sorted(labels)], np.uint8)

    def __call__(self, mask: Array, path: Path) -> Pixels:
        """Map a mask of colours (H, W, 3); the path is for the error.

        Raises:
            LabelValueError: If a colour is of no class.
            DataError: If the mask holds no colours.
        """
        if mask.ndim != 3:
            raise DataError(
                f"mask {path} has one band, data.colors is for RGB masks; use data.value_map"
            )
        codes = _pack(mask)
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        wrong = self.codes[places] != codes
        if wrong.any():
            values, counts = np.unique(codes[wrong], return_counts=True)
            order = np.argsort(-counts)
            seen = [f"{unpack_color(values[i])} ({counts[i]} pixels)" for i in order]
            raise LabelValueError(
                f"mask {path} has colours of no class: {listed(seen, _N_SHOWN)}; add them to "
                f"data.colors, to a class or to {IGNORE_NAME!r} (blended borders: save masks "
                "without smoothing)",
                dict(zip(values.tolist(), counts.tolist(), strict=True)),
            )
        ids: Pixels = self.labels[places]
        return ids


def _triples(
    name: str, given: Sequence[int] | Sequence[Sequence[int]]
) -> list[tuple[int, int, int]]:
    many: Any = given if given and not isinstance(given[0], int) else [given]
    for color in many:
        if len(color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in color):
            raise ValueError(f"data.colors[{name!r}] = {given}: a colour is three of 0..255")
    return [(int(red), int(green), int(blue)) for red, green, blue in many]


def _pack(colors: Array) -> NDArray[np.int64]:
    """(..., 3) uint8 -> one number per colour."""
    wide = colors.astype(np.int64)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def count_colors(mask: Array) -> Counter[int]:
    """Count the pixels of every packed colour of a mask (H, W, 3)."""
    values, counts = np.unique(_pack(mask), return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def unpack_color(code: int) -> list[int]:
    """Return [red, green, blue] of a packed colour.

    >>> unpack_color(0x804080)
    [128, 64, 128]
    """
    return [int(code) >> 16, int(code) >> 8 & 255, int(code) & 255]
