"""Expected calibration error: whether pixels that are 80 % sure are right 80 times in 100.

Guo et al., "On Calibration of Modern Neural Networks", ICML 2017: the softmax of the predicted
class is sorted into equal bins, (0, 1/15], (1/15, 2/15] and so on; the error is the mean over all
labelled pixels of the distance between a bin's accuracy and its mean confidence.

Confidences are summed as integers, in units of 2^-24: the sums do not depend on batches or ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seglab.image_scores import count_ids

N_BINS = 15
_UNIT = 1 << 24  # of confidence: float32 has no more digits near one


def count_confidence(confidence: Tensor, prediction: Tensor, target: Tensor, k: int) -> Tensor:
    """Count pixels by their confidence in each image, without asking the device.

    Args:
        confidence: Probability of the predicted class, float (B, H, W) in 0..1.
        prediction: Class ids (B, H, W).
        target: Labels (B, H, W); pixels outside 0..K-1 count nowhere.
        k: Number of classes K.

    Returns:
        int64 (B, 3, 16): labelled pixels in each bin, those that were right, and the sum of their
        confidence in units of 2^-24. The last column counts pixels whose confidence is NaN.
    """
    confidence, prediction, target = (x.flatten(1) for x in (confidence, prediction, target))
    is_number = confidence.isfinite()
    edges = torch.arange(1, N_BINS, device=confidence.device) / N_BINS
    bins = torch.bucketize(torch.where(is_number, confidence, 0), edges)
    bins = torch.where(is_number, bins, N_BINS)
    bins = torch.where((target >= 0) & (target < k), bins, N_BINS + 1)
    right = torch.where(prediction == target, bins, N_BINS + 1)
    units = (torch.where(is_number, confidence, 0).double() * _UNIT).round().long()
    sums = torch.zeros(len(bins), N_BINS + 2, dtype=torch.long, device=bins.device)
    sums = sums.scatter_add_(1, bins, units)[:, :-1]
    return torch.stack([count_ids(bins, N_BINS + 1), count_ids(right, N_BINS + 1), sums], dim=1)


def reliability(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Part of all pixels, accuracy and mean confidence of each bin, float64 (..., 15).

    Args:
        counts: Of `count_confidence`, summed over images, (..., 3, 16).
    """
    pixels, right, units = counts[..., :N_BINS].double().unbind(-2)
    share = pixels / pixels.sum(-1, keepdim=True)
    return share, right / pixels, units / _UNIT / pixels


def calibration_error(counts: Tensor) -> Tensor:
    """Mean distance between accuracy and confidence, (...); NaN if a confidence was.

    >>> counts = torch.zeros(3, 16, dtype=torch.long)
    >>> counts[:, 14] = torch.tensor([4, 3, 4 * 2**24])  # 4 pixels are sure, 3 of them are right
    >>> calibration_error(counts)
    tensor(0.2500, dtype=torch.float64)
    """
    share, accuracy, confidence = reliability(counts)
    error = torch.where(share > 0, share * (accuracy - confidence).abs(), 0).sum(-1)
    is_known = (counts[..., 0, -1] == 0) & (counts[..., 0, :N_BINS].sum(-1) > 0)
    return torch.where(is_known, error, torch.nan)
