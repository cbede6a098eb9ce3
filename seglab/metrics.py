"""Dataset-level segmentation metrics from one confusion matrix.

The matrix is summed over the whole set and over all ranks before any ratio is taken, as
MMSegmentation's `IoUMetric` does (`mmseg/evaluation/metrics/iou_metric.py`): mIoU is not a mean
over images. Pixels labelled `ignore_index` count nowhere. A class absent from labels *and*
predictions is NaN and left out of the means; a class that is predicted but never labelled has IoU 0
and counts in mIoU (and, as there, has no accuracy).

torchmetrics' own Jaccard index is not used: with deterministic algorithms on, it allocates one row
of K x K per pixel (47 GB for a 512 x 512 image at 150 classes), and its `MeanIoU` averages over
images and knows no ignored label.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

AVERAGES = ("mIoU", "mAcc", "aAcc", "mDice", "mPrecision", "fwIoU")


def count_pairs(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count how often each (label, prediction) pair of classes occurs.

    Args:
        prediction: Class ids, any shape, integer.
        target: Labels of the same shape; a pixel whose label or prediction lies outside
            `0..num_classes-1` is not counted.
        num_classes: Number of classes K.

    Returns:
        int64 (K, K): rows are labels, columns are predictions.

    >>> count_pairs(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 255]), num_classes=2).tolist()
    [[1, 0], [0, 1]]
    """
    prediction, target = prediction.flatten().long(), target.flatten().long()
    counted = (
        (target >= 0) & (target < num_classes) & (prediction >= 0) & (prediction < num_classes)
    )
    # One bin more than pairs takes the pixels that do not count. Selecting the others by a boolean
    # index instead would make the GPU tell the host how many there are, at every step.
    trash = num_classes**2
    pairs = torch.where(counted, target * num_classes + prediction, trash)
    return histogram(pairs, trash + 1)[:-1].view(num_classes, num_classes)


def histogram(values: Tensor, n_bins: int) -> Tensor:
    """Count how often 0..n_bins-1 occur, without asking a GPU for anything."""
    if values.device.type == "cpu":
        return torch.bincount(values, minlength=n_bins)
    # On a GPU `bincount` asks the host for the largest value; adding integers is exact in any
    # order.
    zeros = torch.zeros(n_bins, dtype=torch.long, device=values.device)
    return zeros.scatter_add_(0, values, torch.ones_like(values))


class SegmentationMetrics(Metric):
    """mIoU, mean and overall accuracy, mean Dice, and their per-class rows, over a whole dataset.

    Args:
        num_classes: Number of classes K.
        ignore_index: Label value that counts nowhere.
        **kwargs: Passed to `torchmetrics.Metric`.

    `update(prediction, target)` takes integer class ids of equal shape (B, H, W). `compute()`
    returns the figures of `ratios`: the averages as floats in 0..1 (NaN if nothing was labelled),
    `IoU`, `Acc`, `Precision`, `Dice` and `share` as float64 (K,) on the CPU, NaN for absent
    classes. It raises ValueError if a label or prediction was outside the classes: this is noticed
    in `update` without asking the GPU, hence told only here.

    >>> metrics = SegmentationMetrics(num_classes=3)
    >>> metrics.update(torch.tensor([[[0, 0, 1]]]), torch.tensor([[[0, 1, 1]]]))
    >>> results = metrics.compute()
    >>> results["mIoU"], results["aAcc"].__round__(4), results["IoU"].tolist()
    (0.5, 0.6667, [0.5, 0.5, nan])
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    confusion: Tensor
    """int64 (K, K), pixels seen so far on this rank: rows are labels, columns predictions."""
    label_range: Tensor
    prediction_range: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or 0 <= ignore_index < num_classes:
            raise ValueError(
                f"num_classes={num_classes} and ignore_index={ignore_index} do not go together:"
                " there must be at least"
                " one class, and the ignored value must lie outside 0..num_classes-1."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.long), "sum")
        # (-smallest, largest) value seen, so that one reduction, max, serves both ends.
        self.add_state("label_range", torch.zeros(2, dtype=torch.long), "max")
        self.add_state("prediction_range", torch.zeros(2, dtype=torch.long), "max")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch: class ids `prediction` against labels `target`, both (B, H, W)."""
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}:"
                " resize the logits"
                " to the label's size before the argmax."
            )
        if prediction.is_floating_point() or target.is_floating_point():
            raise ValueError(
                f"prediction is {prediction.dtype} and target {target.dtype}, but class ids are"
                " integers: pass"
                " logits.argmax(dim=1)."
            )
        if not target.numel():
            return
        ignored = target == self.ignore_index
        labels = torch.where(ignored, 0, target.long())
        predictions = torch.where(ignored, 0, prediction.long())  # whatever they are
        # Never in place: under inference mode that would leave tensors which a later update may not
        # touch.
        self.confusion = self.confusion + count_pairs(prediction, target, self.num_classes)
        self.label_range = torch.maximum(self.label_range, _extremes(labels))
        self.prediction_range = torch.maximum(self.prediction_range, _extremes(predictions))

    def compute(self) -> dict[str, Any]:
        """Ratios over all that was counted, on all ranks; see the class."""
        self._refuse_strays("label", self.label_range)
        self._refuse_strays("prediction", self.prediction_range)
        return summarize(self.confusion)

    def _refuse_strays(self, what: str, extremes: Tensor) -> None:
        smallest, largest = -int(extremes[0]), int(extremes[1])
        stray = smallest if smallest < 0 else largest
        if 0 <= stray < self.num_classes:
            return
        raise ValueError(
            f"a {what} holds the value {stray}, but the {self.num_classes} classes are"
            f" 0..{self.num_classes - 1} and"
            f" only {self.ignore_index} is ignored: map the value to a class or to"
            f" {self.ignore_index}, or correct"
            " num_classes."
        )

    def table(
        self,
        class_names: Sequence[str] | None = None,
        more: Mapping[str, tuple[Tensor, float]] | None = None,
    ) -> str:
        """The results as text: one line per class, then the means, in percent.

        Args:
            class_names: K names; numbers if None.
            more: Further columns: values (K,) and their mean.

        >>> metrics = SegmentationMetrics(num_classes=2)
        >>> metrics.update(torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 1, 1, 1]]]))
        >>> print(metrics.table(["sky", "road"]))
        class       IoU    Acc   Dice  % of labels
        sky       50.00 100.00  66.67        25.00
        road      66.67  66.67  80.00        75.00
        mean      58.33  83.33  73.33
        all              75.00
        """
        results = self.compute()
        names = class_names or [str(index) for index in range(self.num_classes)]
        width = max(8, *(len(name) for name in names)) + 1
        columns = {key: (results[key], results[f"m{key}"]) for key in ("IoU", "Acc", "Dice")}
        columns |= more or {}
        head = " ".join(f"{key:>6}" for key in columns)
        lines = [f"{'class':<{width}}{head}  % of labels"]
        cells = zip(*(values.tolist() for values, _ in columns.values()), strict=True)
        for name, row, share in zip(names, cells, results["share"].tolist(), strict=True):
            lines.append(f"{name:<{width}}{_row(row, columns)} {_percent(share):>12}")
        lines.append(f"{'mean':<{width}}{_row([mean for _, mean in columns.values()], columns)}")
        lines.append(f"{'all':<{width}}{'':>6} {_percent(results['aAcc']):>6}")
        return "\n".join(lines)


def summarize(confusion: Tensor) -> dict[str, Any]:
    """Derive every figure of `SegmentationMetrics.compute` from a confusion matrix.

    Args:
        confusion: Counts (K, K): rows are labels, columns are predictions.

    Returns:
        The figures of `SegmentationMetrics.compute`, and `share`, (K,): each class's part of all
        labelled pixels.

    >>> summarize(torch.tensor([[3, 1], [0, 4]]))["aAcc"]
    0.875
    """
    counts = confusion.detach().cpu().double()  # (K, K); 53 bits hold 9e15 pixels exactly
    figures = ratios(counts.diagonal(), counts.sum(1), counts.sum(0))
    return {name: v.item() if v.ndim == 0 else v for name, v in figures.items()}


def ratios(hits: Tensor, labelled: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """Derive all figures from counts per class; any leading dimensions are kept.

    Args:
        hits: Pixels of each class that were found, float64 (..., K).
        labelled: Pixels that are labelled so.
        predicted: Pixels, with a label, that were predicted so.

    Returns:
        `IoU`, `Acc` (which is recall), `Precision`, `Dice` and `share`, (..., K), 0 / 0 being NaN;
        the means over the classes `mIoU`, `mAcc`, `mPrecision` and `mDice`, which leave NaN out;
        over all pixels `aAcc`, and `fwIoU`, the IoU weighted by share. All (...).

    >>> counts = torch.tensor([[3.0, 0.0], [3.0, 1.0], [4.0, 0.0]], dtype=torch.float64)
    >>> ratios(*counts)["Precision"].tolist()
    [0.75, nan]
    """
    # 0 / 0 is NaN, and NaN is what an absent class should be.
    each = {
        "IoU": hits / (labelled + predicted - hits),
        "Acc": hits / labelled,
        "Precision": hits / predicted,
        "Dice": 2 * hits / (labelled + predicted),
    }
    means = {f"m{name}": values.nanmean(-1) for name, values in each.items()}
    share = labelled / labelled.sum(-1, keepdim=True)
    weighted = torch.where(labelled > 0, share * each["IoU"], 0).sum(-1)
    n_labelled = labelled.sum(-1)
    return {
        **means,
        "aAcc": hits.sum(-1) / n_labelled,
        "fwIoU": torch.where(n_labelled > 0, weighted, torch.nan),
        **each,
        "share": share,
    }


class MeanOverImages(Metric):
    """Mean of one number per image over a dataset, whatever the batches and the ranks.

    torchmetrics' own MeanMetric with its check for NaN off, which waits for the device, drops the
    weights too (1.9.0), and Lightning's mean over batches truncates the ranks' sample counts.

    Args:
        **kwargs: Passed to `torchmetrics.Metric`.

    >>> loss = MeanOverImages()
    >>> loss.update(torch.tensor([1.0, 1.0, 1.0])); loss.update(torch.tensor([5.0]))
    >>> loss.compute()
    tensor(2.)
    """

    full_state_update = False

    total: Tensor
    n_images: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Apple's devices have no float64.
        exact = torch.float32 if torch.backends.mps.is_available() else torch.float64
        self.add_state("total", torch.zeros((), dtype=exact), "sum")
        self.add_state("n_images", torch.zeros((), dtype=torch.long), "sum")

    def update(self, values: Tensor) -> None:
        """Count images: one number for each, (B,)."""
        self.total = self.total + values.detach().to(self.total.dtype).sum()
        self.n_images = self.n_images + len(values)

    def compute(self) -> Tensor:
        """The mean, float32; NaN before the first image."""
        return (self.total / self.n_images).float()


def _extremes(values: Tensor) -> Tensor:
    low, high = values.aminmax()
    return torch.stack((-low, high))


def _row(values: Sequence[float], titles: Iterable[str]) -> str:
    pairs = zip(values, titles, strict=True)
    return " ".join(f"{_percent(value):>{max(6, len(title))}}" for value, title in pairs)


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.2f}"
