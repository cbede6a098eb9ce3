"""Cross-entropy as MMSegmentation averages it, with its hard-pixel mining.

Other losses come by class path from segmentation_models_pytorch, whose names and arguments are
`segmentation_models_pytorch.losses.DiceLoss(mode="multiclass", ignore_index=255)` and likewise
`LovaszLoss`, `FocalLoss`, `TverskyLoss`, `JaccardLoss`: they take the same logits and target.
`WeightedSum` adds several up.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.profiler import record_function

from seglab.operators.logit_resize import BILINEAR, LogitResize
from seglab.operators.observers import requires_plain_operators
from seglab.operators.upsampled import upsampled_log_likelihood, upsampled_nll


class CrossEntropy(_Loss):
    """Pixel-wise cross-entropy, by default divided by *all* pixels, ignored ones included.

    That division is MMSegmentation's default (`cross_entropy_loss.py`) and unlike torch's: an image
    of which half is ignored weighs half as much. The scale of gradients depends on it.

    What the logits are at a pixel that does not count (ignored, not among the hard ones, of a class
    of weight 0) changes neither loss nor gradient, infinity and NaN included; a class masked by
    -inf gets probability 0. NaN at a pixel that counts makes the loss NaN.

    Args:
        ignore_index: label that adds no loss, and the only one: torch's -100 is refused as any
            other label outside the classes, unless it is the ignore index.
        class_weight: K factors; the sum is then divided by the factors of the valid pixels.
        avg_non_ignore: divide by valid pixels only, as torch does.
        ohem_thresh: keep only pixels whose probability of the true class is below this, and always
            the hardest `ohem_min_kept` of each image on average (online hard example mining,
            `ohem_pixel_sampler.py`). Pixels of weight 0 are ranked too, as there. The divisor stays
            that of the other options.
        ohem_min_kept: pixels kept per image; without `ohem_thresh` just those with the largest
            loss.

    Raises:
        ValueError: options that do not go together, a class weight below 0 or not finite; in a
            call, a label outside the classes (on the CPU: a GPU is not asked, its own assertion
            stops the run).

    >>> logits, target = torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 1, 255, 255]]])
    >>> round(CrossEntropy()(logits, target).item(), 4)  # log(2) of two pixels, over four
    0.3466
    >>> round(CrossEntropy(avg_non_ignore=True)(logits, target).item(), 4)
    0.6931
    """

    _weight_bits: Tensor | None

    def __init__(
        self,
        ignore_index: int = 255,
        class_weight: Sequence[float] | None = None,
        avg_non_ignore: bool = False,
        ohem_thresh: float | None = None,
        ohem_min_kept: int | None = None,
    ) -> None:
        super().__init__()
        if ohem_thresh is not None and not 0 < ohem_thresh <= 1:
            raise ValueError(f"ohem_thresh is a probability in (0, 1], got {ohem_thresh}")
        if ohem_min_kept is not None and ohem_min_kept < 1:
            raise ValueError(f"ohem_min_kept must be at least 1 pixel, got {ohem_min_kept}")
        if ohem_thresh is not None and ohem_min_kept is None:
            raise ValueError(
                "ohem_thresh needs ohem_min_kept: MMSegmentation's is 100000 per image"
            )
        self.ignore_index = ignore_index
        self.register_buffer("_weight_bits", _bits_of(class_weight), persistent=False)
        self.avg_non_ignore = avg_non_ignore
        self.ohem_thresh = ohem_thresh
        self.ohem_min_kept = ohem_min_kept

    @property
    def class_weight(self) -> Tensor | None:
        """K factors in float32, whatever precision the module has been cast to."""
        return None if self._weight_bits is None else self._weight_bits.view(torch.float32)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Average the loss of logits (B, K, H, W) against class ids (B, H, W), int64.

        Raises:
            ValueError: the number of class weights is not K.
        """
        valid = target != self.ignore_index
        target, factors, divisor = self._weigh(logits, target, valid)
        given = logits.detach()
        # Selected before the softmax: 0 * NaN is NaN, in its backward pass too.
        logits = torch.where((factors != 0).unsqueeze(1), logits, 0)
        # torch's default would let -100 pass; `ignore_index` itself is no longer in the target.
        losses = F.cross_entropy(logits, target, reduction="none", ignore_index=self.ignore_index)
        if self.ohem_min_kept is not None:
            ranked = losses.detach()
            if self.ohem_thresh is not None and self.class_weight is not None:
                ranked = F.cross_entropy(
                    given, target, reduction="none", ignore_index=self.ignore_index
                )
            factors = factors * self._hard(ranked, factors, valid)
        return torch.where(factors == 0, 0, losses * factors).sum() / divisor

    def on_upsampled(
        self, logits: Tensor, target: Tensor, resize: LogitResize = BILINEAR
    ) -> Tensor:
        """As `forward` on logits resized to the target's size, which are never made.

        Args:
            logits: (B, K, h, w), of any size.
            target: class ids (B, H, W), int64.
            resize: how they are resized.

        Raises:
            ValueError: the number of class weights is not K.
        """
        if logits.shape[-2:] == target.shape[-2:] and resize.through is None:
            return self(logits, target)  # type: ignore[no-any-return]
        valid = target != self.ignore_index
        target, factors, divisor = self._weigh(logits, target, valid)
        if self.ohem_min_kept is not None:
            ranked = -upsampled_log_likelihood(logits, target, resize, valid)
            factors = factors * self._hard(ranked, factors, valid)
        return upsampled_nll(logits, target, factors, resize) / divisor

    def _weigh(
        self, logits: Tensor, target: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | int]:
        """Target with class 0 where ignored, factor of each pixel (0 there), and the divisor."""
        target = torch.where(valid, target, 0)
        self._refuse_strays(target, logits.shape[1])
        weights = self.class_weight
        if weights is None:
            n_valid = valid.sum().clamp_min(1)
            return target, valid.float(), n_valid if self.avg_non_ignore else target.numel()
        if len(weights) != logits.shape[1]:
            raise ValueError(
                f"class_weight has {len(weights)} factors for {logits.shape[1]} classes"
            )
        factors = weights[target] * valid
        return target, factors, factors.sum().clamp_min(torch.finfo(factors.dtype).eps)

    def _refuse_strays(self, target: Tensor, n_classes: int) -> None:
        if target.device.type != "cpu" or requires_plain_operators(target):
            return  # the kernels' own assertions stop the run
        if torch.compiler.is_compiling() or not target.numel():
            return
        with record_function("seglab::check_labels"):
            low, high = (int(extreme) for extreme in target.aminmax())
        if low < 0 or high >= n_classes:
            raise ValueError(
                f"the target holds the value {low if low < 0 else high}, but the {n_classes}"
                f" classes are 0..{n_classes - 1} and only {self.ignore_index} is ignored: map the"
                f" value to a class or to {self.ignore_index}, or set the loss's ignore_index."
            )

    def _hard(self, losses: Tensor, factors: Tensor, valid: Tensor) -> Tensor:
        """Mask (B, H, W) of the pixels that hard example mining keeps."""
        assert self.ohem_min_kept is not None
        # NaN is hardest of all, so that it is never out of sight; where it does not count, easiest.
        losses = losses.masked_fill(losses.isnan() & (factors != 0), torch.inf)
        losses = losses.masked_fill(losses.isnan(), 0)
        n_kept = self.ohem_min_kept * len(losses)
        if self.ohem_thresh is None:
            hardness = torch.where(factors == 0, 0, losses * factors)
            return _among_largest(hardness, valid, n_kept)
        probability = losses.neg().exp()
        ordered = probability.masked_fill(~valid, torch.inf).flatten().sort().values
        # The pixel of rank n_kept sets the bar when too few are below the threshold. Its index is
        # a tensor: the host does not wait to learn how many are valid.
        rank = (valid.sum() - 1).clamp(0, n_kept)
        bar = ordered.gather(0, rank.unsqueeze(0)).clamp_min(self.ohem_thresh)
        return valid & (probability < bar)


def _among_largest(values: Tensor, valid: Tensor, n_kept: int) -> Tensor:
    order = values.masked_fill(~valid, -torch.inf).flatten().argsort(descending=True)
    kept = torch.zeros_like(valid).flatten().index_fill(0, order[:n_kept], True)
    return kept.view_as(valid) & valid


def _bits_of(class_weight: Sequence[float] | None) -> Tensor | None:
    """Factors as integers, which a cast to half precision (`bf16-true`) does not round."""
    if class_weight is None:
        return None
    for index, factor in enumerate(class_weight):
        if not 0 <= factor < float("inf"):
            raise ValueError(
                f"class_weight[{index}] is {factor}: it must be finite and not below 0"
            )
    return torch.tensor(class_weight, dtype=torch.float32).view(torch.int32)


class WeightedSum(_Loss):
    """Sum of losses, each times a weight.

    Args:
        losses: called with logits (B, K, H, W) and target (B, H, W).
        weights: one per loss; all 1 when left out.

    Raises:
        ValueError: no losses, or another number of weights.

    >>> logits, target = torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 1, 1, 0]]])
    >>> both = WeightedSum([CrossEntropy(), CrossEntropy()], [1.0, 0.5])
    >>> round((both(logits, target) / CrossEntropy()(logits, target)).item(), 4)
    1.5
    """

    def __init__(self, losses: list[_Loss], weights: list[float] | None = None) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.weights = [1.0] * len(losses) if weights is None else weights
        if not losses or len(self.weights) != len(losses):
            raise ValueError(
                f"WeightedSum has {len(losses)} losses and {len(self.weights)} weights: give one "
                "weight per loss, or leave them out"
            )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Weighted sum of the losses of logits (B, K, H, W) against class ids (B, H, W)."""
        pairs = zip(self.losses, self.weights, strict=True)
        return torch.stack([weight * loss(logits, target) for loss, weight in pairs]).sum()

    def on_upsampled(
        self, logits: Tensor, target: Tensor, resize: LogitResize = BILINEAR
    ) -> Tensor:
        """As `forward` on logits resized to the target's size, which are made at most once."""
        height, width = target.shape[-2:]
        resized: Tensor | None = None
        terms = []
        for loss, weight in zip(self.losses, self.weights, strict=True):
            on_upsampled = getattr(loss, "on_upsampled", None)
            if on_upsampled is not None:
                terms.append(weight * on_upsampled(logits, target, resize))
                continue
            if resized is None:
                resized = resize(logits, (height, width))
            terms.append(weight * loss(resized, target))
        return torch.stack(terms).sum()


def refuse_unfit_loss(loss: nn.Module, num_classes: int, ignore_index: int) -> None:
    """Try a loss on a few pixels, some of them ignored, before it is trained with.

    Args:
        loss: called with logits (B, K, H, W) and target (B, H, W).
        num_classes: K.
        ignore_index: label of the pixels that must not count.

    Raises:
        ValueError: it fails, makes no single finite number, or counts ignored pixels.

    >>> refuse_unfit_loss(CrossEntropy(), num_classes=3, ignore_index=255)
    >>> refuse_unfit_loss(nn.CrossEntropyLoss(), num_classes=3, ignore_index=255)
    Traceback (most recent call last):
    ValueError: the loss CrossEntropyLoss cannot take 3 classes and ignored pixels of 255...
    """
    if any(tensor.is_meta for tensor in (*loss.buffers(), *loss.parameters())):
        return  # built without numbers
    name, trial = type(loss).__name__, copy.deepcopy(loss).cpu()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, num_classes, 4, 8, generator=generator, device="cpu")
    target = (torch.arange(64, device="cpu") % min(num_classes, 3)).view(2, 4, 8)
    logits += 6.0 * F.one_hot(target, num_classes).movedim(-1, 1)  # right, so that wrongs show
    target[:, :, 5:] = ignore_index
    changed = logits.clone()
    changed[..., 5:] = 0.0
    changed[:, 0, :, 5:] = 20.0
    try:
        with torch.device("cpu"):
            first, second = (trial(scores, target.clone()) for scores in (logits, changed))
    except Exception as error:  # whatever it was not made for
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"the loss {name} cannot take {num_classes} classes and ignored pixels of "
            f"{ignore_index} ({why}); losses of segmentation_models_pytorch take mode: multiclass "
            f"and ignore_index: {ignore_index}"
        ) from error
    if first.ndim or not first.isfinite():
        raise ValueError(f"the loss {name} makes {first.tolist()}: it must make one finite number")
    if not torch.isclose(first, second, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"the loss {name} counts ignored pixels: set its ignore_index to {ignore_index}"
        )
