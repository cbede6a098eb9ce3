"""The images that an evaluation found hardest and easiest, kept while it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from seglab.captions import Sample
from seglab.reporting.file_names import EXTREMES
from seglab.reporting.pictures import to_mask, to_picture
from seglab.visualize import Pixels, grid, save_picture


class Extremes:
    """Keeps small copies of the images with the largest and smallest scores, on their device.

    The device is asked for nothing until `samples`, and memory does not grow with the set.

    Args:
        n_kept: Of the best, and of the worst.
        side: Longest side of the copies in pixels.

    >>> found = Extremes(n_kept=1, side=2)
    >>> masks = torch.zeros(3, 2, 2, dtype=torch.uint8)
    >>> found.update(list("abc"), masks[:, None], masks, masks, torch.tensor([0.2, 0.9, 0.5]))
    >>> [sample.name for sample in (*found.best(), *found.worst())]
    ['b', 'a']
    """

    def __init__(self, n_kept: int = 4, side: int = 256) -> None:
        self.n_kept = n_kept
        self.side = side
        self._names: list[str] = []
        self._best: dict[str, Tensor] = {}
        self._worst: dict[str, Tensor] = {}

    def update(
        self, names: Sequence[str], images: Tensor, labels: Tensor, found: Tensor, scores: Tensor
    ) -> None:
        """Look at one batch.

        Args:
            names: Of B images.
            images: (B, C, H, W) in 0..255.
            labels: Class ids (B, h, w).
            found: Predicted ids (B, h, w).
            scores: (B,); images whose score is NaN are passed over.
        """
        first = len(self._names)
        self._names += names
        new = self._small_copies(images, labels, found)
        new["score"] = scores
        new["index"] = torch.arange(first, len(self._names), device=scores.device)
        self._best = _keep(self._best, new, self.n_kept, sign=1)
        self._worst = _keep(self._worst, new, self.n_kept, sign=-1)

    def best(self) -> list[Sample]:
        """The largest scores, the largest first."""
        return self._samples(self._best)

    def worst(self) -> list[Sample]:
        """The smallest scores, the smallest first."""
        return self._samples(self._worst)

    def _small_copies(self, images: Tensor, labels: Tensor, found: Tensor) -> dict[str, Tensor]:
        """Copies in the upper left corner of squares, so that all sizes go into one tensor."""
        height, width = labels.shape[-2:]
        factor = min(1.0, self.side / max(height, width))
        size = max(1, round(height * factor)), max(1, round(width * factor))
        small = interpolate(images.float(), size, mode="area")
        masks = torch.stack([labels.clamp(max=255), found.clamp(max=255)], 1).float()
        copies = torch.cat([small, interpolate(masks, size, mode="nearest")], 1)
        square = copies.new_zeros(*copies.shape[:2], self.side, self.side)
        square[..., : size[0], : size[1]] = copies
        sizes = torch.tensor([size], device=labels.device).expand(len(labels), 2)
        return {"copies": square, "size": sizes}

    def _samples(self, kept: dict[str, Tensor]) -> list[Sample]:
        if not kept:
            return []
        on_host = {key: values.cpu() for key, values in kept.items()}
        parts = zip(*(on_host[key] for key in ("index", "copies", "size", "score")), strict=True)
        found = []
        for index, copies, size, score in parts:
            if score.isnan():
                continue
            corner = copies[:, : int(size[0]), : int(size[1])]
            label, prediction = (to_mask(ids) for ids in corner[-2:].round().long())
            image = to_picture(corner[:-2].round().clamp(0, 255))
            found.append(Sample(self._names[index], image, label, prediction, float(score)))
        return found


def _keep(
    old: dict[str, Tensor], new: dict[str, Tensor], n_kept: int, sign: int
) -> dict[str, Tensor]:
    """Of two collections the `n_kept` with the largest score times sign."""
    both = {key: torch.cat([old[key], values]) if old else values for key, values in new.items()}
    rank = (sign * both["score"]).nan_to_num(-torch.inf)
    order = rank.topk(min(n_kept, len(rank))).indices
    return {key: values[order] for key, values in both.items()}


def merge(
    parts: Sequence[tuple[list[Sample], list[Sample]]], n_kept: int
) -> tuple[list[Sample], list[Sample]]:
    """Best and worst of several ranks; an image is one or the other, and counted once."""
    every = {sample.name: sample for part in parts for side in part for sample in side}
    ranked = sorted(every.values(), key=lambda sample: (sample.score, sample.name))
    n_worst = min(n_kept, len(ranked) - len(ranked) // 2)
    n_best = min(n_kept, len(ranked) // 2)
    return ranked[::-1][:n_best], ranked[:n_worst]


def write_extremes(
    folder: Path, best: Sequence[Sample], worst: Sequence[Sample], colors: Pixels, side: int
) -> None:
    """Write `pictures/best_1.png`, ... and what they show, in `extremes.json`."""
    rows: list[dict[str, Any]] = []
    for kind, samples in (("best", best), ("worst", worst)):
        for number, sample in enumerate(samples, 1):
            file = f"pictures/{kind}_{number}.png"
            save_picture(folder / file, grid([sample.row], colors, side))
            shown = {"kind": kind, "name": sample.name, "mIoU": sample.score, "file": file}
            rows.append(shown)
    (folder / EXTREMES).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
