"""Choose which samples of a split are used, and how often."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import floor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seglab.data.errors import DataError
from seglab.data.sources.source import IGNORE_INDEX, Pixels, Shapes, Source, SourceWrapper


class Selection(SourceWrapper):
    """Some samples of another source, in a given order; an index may come more than once.

    Args:
        source: Where the samples come from.
        indices: Which.
    """

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        super().__init__(source)
        self.indices = list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, epoch: int = 0) -> tuple[Pixels, Pixels]:
        """Read the sample that stands at this place."""
        return self.source.read(self.indices[index], epoch)

    def read_mask(self, index: int) -> Pixels:
        """Read the mask that stands at this place."""
        return self.source.read_mask(self.indices[index])

    def name(self, index: int) -> str:
        """Return the inner source's name; repeated samples share it."""
        return self.source.name(self.indices[index])

    def shapes(self, index: int) -> Shapes:
        """Return the inner source's shapes."""
        return self.source.shapes(self.indices[index])


def limit_source(source: Source, limit: float | str) -> Source:
    """Keep a part of a source.

    Args:
        source: All samples.
        limit: A share in (0, 1], drawn once and for all (a smaller share is part of a larger
            one, whatever the seed); or a text file with one sample name per line.

    Raises:
        ValueError: If the share is not in (0, 1].
        DataError: If the list names samples that are not there.

    >>> from seglab.data.scenes import Scenes
    >>> len(limit_source(Scenes(40, size=32), 0.25))
    10
    """
    if isinstance(limit, str):
        return Selection(source, _listed(source, Path(limit)))
    if not 0 < limit <= 1:
        raise ValueError(f"data.limit {limit} must be a share in (0, 1] or a file of names")
    count = max(1, round(limit * len(source)))
    order = np.random.default_rng(0).permutation(len(source))
    return Selection(source, sorted(order[:count].tolist()))


def _listed(source: Source, path: Path) -> list[int]:
    try:
        names = path.read_text().split()
    except OSError as error:
        raise DataError(f"cannot read data.limit {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data.limit {path} is no text: list one name per line") from error
    places = {source.name(index): index for index in range(len(source))}
    unknown = [name for name in names if name not in places]
    if unknown or not names:
        known = next(iter(places))
        raise DataError(
            f"data.limit {path} lists {len(names)} names, {len(unknown)} of which are not in the "
            f"training set: {unknown[:3]}; a name looks like {known!r}"
        )
    return [places[name] for name in names]


def repeat_rare_classes(source: Source, threshold: float, seed: int = 0) -> Source:
    """Repeat images that hold a rare class, as LVIS does (Gupta et al. 2019, section 5).

    A class in a share f of the images has the factor ``max(1, sqrt(threshold / f))``; an image is
    repeated by the largest factor of its classes, fractions being rounded up or down by chance.

    Args:
        source: The samples; all masks are read once, in threads.
        threshold: Share of the images below which a class counts as rare.
        seed: Of the rounding.
    """
    with ThreadPoolExecutor(8) as pool:
        present = np.stack([*pool.map(lambda i: _present(source, i), range(len(source)))])
    share = present.mean(0).clip(min=1e-12)
    factors = (present * np.sqrt(threshold / share).clip(min=1)).max(1).clip(min=1)
    lucky = np.random.default_rng([seed, 1]).random(len(source))
    counts = [
        floor(factor) + (chance < factor % 1) for factor, chance in zip(factors, lucky, strict=True)
    ]
    return Selection(source, np.repeat(np.arange(len(source)), counts).tolist())


def _present(source: Source, index: int) -> NDArray[np.bool_]:
    found = np.bincount(source.read_mask(index).ravel(), minlength=256)[:IGNORE_INDEX] > 0
    return np.asarray(found)
