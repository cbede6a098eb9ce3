"""Counts of every image for itself: scores per image, and confidence intervals over images.

A figure of a test set is one draw: other images of the same kind would have given another. The
percentile bootstrap (Efron 1979) draws the images again, with replacement, and looks how far the
figure moves. Images are the unit, since the pixels of one image are not independent.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seglab.metrics import histogram, ratios

N_DRAWS = 1000
_CHUNK = 100  # draws at a time


def count_images(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count each class of each image, without asking the device for anything.

    Args:
        prediction: Class ids (B, H, W).
        target: Labels (B, H, W); pixels outside 0..K-1 in either are not counted.
        num_classes: K.

    Returns:
        int64 (B, 3, K): found, labelled and predicted pixels of each class.

    >>> count_images(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 0]]]), 2).tolist()
    [[[1, 1], [2, 1], [1, 2]]]
    """
    prediction, target = prediction.flatten(1).long(), target.flatten(1).long()
    inside = (target >= 0) & (target < num_classes) & (prediction >= 0) & (prediction < num_classes)
    hit = inside & (prediction == target)
    ids = ((hit, target), (inside, target), (inside, prediction))
    counts = [count_ids(torch.where(kept, x, num_classes), num_classes) for kept, x in ids]
    return torch.stack(counts, dim=1)


def count_ids(ids: Tensor, n_ids: int) -> Tensor:
    """How often 0..n_ids-1 occur in each image, int64 (B, n_ids); `n_ids` itself is not counted.

    >>> count_ids(torch.tensor([[0, 1, 2], [1, 1, 1]]), 2).tolist()
    [[1, 1], [0, 3]]
    """
    # A bin more per image takes what does not count, as in `count_pairs`.
    n_images, n_bins = len(ids), n_ids + 1
    first = torch.arange(n_images, device=ids.device)[:, None] * n_bins
    found = histogram((ids.flatten(1) + first).flatten(), n_images * n_bins)
    return found.view(n_images, n_bins)[:, :-1]


def figures(counts: Tensor) -> dict[str, NDArray[np.float64]]:
    """All figures of `ratios` from counts (..., 3, K), as arrays."""
    hits, labelled, predicted = counts.double().unbind(-2)
    return {name: values.numpy() for name, values in ratios(hits, labelled, predicted).items()}


def bootstrap(
    counts: Tensor,
    confidence: float = 0.95,
    n_draws: int = N_DRAWS,
    seed: int = 0,
    derive: Callable[[Tensor], dict[str, NDArray[np.float64]]] = figures,
) -> dict[str, NDArray[np.float64]]:
    """Confidence interval of every figure, were the images others of the same kind.

    Args:
        counts: Of all images, (N, ...), such as those of `count_images`, (N, 3, K).
        confidence: Part of the draws that lie inside.
        n_draws: How often N images are drawn with replacement.
        seed: Of the draws.
        derive: The figures of sums over images, (n, ...).

    Returns:
        For every name of `derive`, by default of `ratios`, the lower and upper ends, (2,) or
        (2, K). Draws in which a class does not occur are left out for that class; NaN where none
        is left.

    Raises:
        ValueError: There are fewer than two images, or `confidence` is not between 0 and 1.
    """
    if len(counts) < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"{len(counts)} image(s) at confidence={confidence}: an interval over images needs two"
            " at least, and a confidence between 0 and 1"
        )
    sums = draw_sums(counts, n_draws, seed)
    ends = ((1 - confidence) / 2, (1 + confidence) / 2)
    return {name: quantiles(values, ends) for name, values in derive(sums).items()}


def draw_sums(counts: Tensor, n_draws: int = N_DRAWS, seed: int = 0) -> Tensor:
    """Draw N images with replacement and add their counts up, again and again.

    The same images are drawn for the same N and seed: figures of two networks are so paired.

    Args:
        counts: Of all images, (N, ...).
        n_draws: How often.
        seed: Of the draws.

    Returns:
        float64 (n_draws, ...).
    """
    random = np.random.default_rng(seed)
    n_images = len(counts)
    flat = counts.double().flatten(1)
    drawn = []
    for start in range(0, n_draws, _CHUNK):
        n_now = min(_CHUNK, n_draws - start)
        often = random.multinomial(n_images, np.full(n_images, 1 / n_images), n_now)
        drawn.append(torch.from_numpy(often).double() @ flat)
    return torch.cat(drawn).view(n_draws, *counts.shape[1:])


def quantiles(values: NDArray[np.float64], ends: tuple[float, float]) -> NDArray[np.float64]:
    """Quantiles over the first axis; an axis of NaN alone gives NaN without a warning."""
    empty = np.isnan(values).all(0)
    filled = np.where(empty, 0, values)
    found: NDArray[np.float64] = np.where(empty, np.nan, np.nanquantile(filled, ends, axis=0))
    return found
