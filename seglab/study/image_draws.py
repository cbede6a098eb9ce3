"""Bootstrap over validation images: how far a difference hangs on the images at hand.

All runs see the same draw of images, since they saw the same images: what an image adds to both
arms cancels, and what it adds in all seeds stays. Drawing the seeds too, images and seeds crossed,
is Owen's pigeonhole bootstrap (2007).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from seglab.image_scores import figures
from seglab.study.pairs import POINTS, Pairs, Runs
from seglab.study.records import run_folder

Floats = NDArray[np.float64]
Ends = tuple[float, float]
N_DRAWS = 2000
ROUNDING = 1e-3
"""Points by which the mIoU of counts may differ from the one that was logged as float32."""
FILE_NAME = "counts.npz"


@dataclass(frozen=True)
class ImageIntervals:
    """95 % intervals of a mean difference, in points; None where they cannot be had.

    Attributes:
        images: Were the images others, the runs being these.
        seeds_and_images: Were both others.
        classes: `images` for the IoU of each class.
        left_out: Of seeds whose counts cannot be used, the reason.
    """

    images: Ends | None
    seeds_and_images: Ends | None
    classes: tuple[Ends | None, ...]
    left_out: dict[int, str]


@dataclass(frozen=True)
class _Drawn:
    """A run's figures in every draw of images, in points: mIoU (draws,), IoU (draws, K)."""

    names: tuple[str, ...]
    miou: Floats
    classes: Floats


class ImageDraws:
    """Figures of all runs of a study under the same draws of its validation images.

    Args:
        study: Folder of the study.
        runs: Its ended runs.
        n_draws: How often the images are drawn.
        seed: Of the draws.
    """

    def __init__(self, study: Path, runs: Runs, n_draws: int = N_DRAWS, seed: int = 0) -> None:
        self.study, self.runs, self.n_draws, self.seed = study, runs, n_draws, seed
        self._drawn: dict[tuple[str, int], _Drawn | str] = {}
        self._often: dict[tuple[str, ...], Floats] = {}

    def intervals(self, pairs: Pairs) -> ImageIntervals:
        """Intervals of the mean difference of the final mIoU, and of each class's IoU."""
        left_out: dict[int, str] = {}
        miou: list[Floats] = []
        classes: list[Floats] = []
        for seed in pairs.seeds:
            first, second = (self._draw(arm, seed) for arm in (pairs.treatment, pairs.control))
            if isinstance(first, str) or isinstance(second, str):
                left_out[seed] = first if isinstance(first, str) else str(second)
            elif first.names != second.names:
                left_out[seed] = "the two arms were validated on different images"
            elif len({each.shape for each in (first.classes, second.classes, *classes[:1])}) > 1:
                left_out[seed] = "the number of classes is not that of the other runs"
            else:
                miou.append(first.miou - second.miou)
                classes.append(first.classes - second.classes)
        if not miou:
            return ImageIntervals(None, None, (), left_out)
        return ImageIntervals(
            _ends(_mean(np.stack(miou, 1))),
            self._with_seeds(np.stack(miou, 1)),
            tuple(_ends(column) for column in _mean(np.stack(classes, 1)).T),
            left_out,
        )

    def _with_seeds(self, differences: Floats) -> Ends | None:
        n_draws, n_seeds = differences.shape
        if n_seeds < 2:
            return None
        random = np.random.default_rng([self.seed, n_seeds])
        often = random.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), n_draws)
        return _ends(_mean(differences, often.astype(float)))

    def _draw(self, arm: str, seed: int) -> _Drawn | str:
        """A run's figures in every draw, or why there are none."""
        if (arm, seed) not in self._drawn:
            self._drawn[arm, seed] = self._draw_anew(arm, seed)
        return self._drawn[arm, seed]

    def _draw_anew(self, arm: str, seed: int) -> _Drawn | str:
        path = run_folder(self.study, arm, seed) / FILE_NAME
        if not path.exists():
            return f"{arm} has no {FILE_NAME}"
        try:
            names, counts = read_counts(path)
        except (ValueError, KeyError, EOFError, BadZipFile) as error:
            return f"{FILE_NAME} of {arm} cannot be read: {error}"
        if len(names) < 2:
            return f"{arm} was validated on {len(names)} image(s), and an interval needs two"
        logged = POINTS * self.runs[arm, seed].final
        counted = POINTS * float(figures(torch.from_numpy(counts.sum(0)))["mIoU"])
        if not abs(counted - logged) <= ROUNDING:
            return (
                f"{FILE_NAME} of {arm} counts an mIoU of {counted:.3f}, but {logged:.3f} was logged"
            )
        sums = self._multiplicities(names) @ counts.reshape(len(names), -1).astype(float)
        found = figures(torch.from_numpy(sums.reshape(self.n_draws, *counts.shape[1:])))
        return _Drawn(names, POINTS * found["mIoU"], POINTS * found["IoU"])

    def _multiplicities(self, names: tuple[str, ...]) -> Floats:
        """How often each image is in each draw, (draws, n): the same wherever the names are."""
        if names not in self._often:
            random = np.random.default_rng([self.seed, zlib.crc32("\0".join(names).encode())])
            chances = np.full(len(names), 1 / len(names))
            often = random.multinomial(len(names), chances, self.n_draws)
            self._often[names] = often.astype(float)
        return self._often[names]


def read_counts(path: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names and counts (n, 3, K) of a run's images, sorted by name."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        names, counts = file["names"], file["counts"]
    order = np.argsort(names, kind="stable")
    return tuple(str(name) for name in names[order]), counts[order]


def _mean(values: Floats, weights: Floats | None = None) -> Floats:
    """Mean over the second axis, the seeds, without NaN; NaN if nothing is left."""
    often = np.ones(values.shape[:2]) if weights is None else weights
    often = often.reshape(*often.shape, *[1] * (values.ndim - 2)) * np.isfinite(values)
    total = often.sum(1)
    summed = (often * np.nan_to_num(values)).sum(1)
    mean: Floats = np.divide(summed, total, out=np.full(summed.shape, np.nan), where=total > 0)
    return mean


def _ends(values: Floats, confidence: float = 0.95) -> Ends | None:
    """Percentiles of draws; None if all are NaN."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return None
    low, high = np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
