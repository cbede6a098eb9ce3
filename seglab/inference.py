"""From a network to scores at any size: whole image or sliding windows, flips and scales averaged.

The window grid is MMSegmentation's (`mmseg/models/segmentors/encoder_decoder.py`): windows start
every `stride` pixels, the last one is moved back inside the image, overlapping logits are averaged,
and an image smaller than the window is used as it is. Test-time augmentation averages the softmax
of all views at the final size, as its `seg_tta.py` does; the views are resized copies of the image
that the data pipeline delivers. Only running sums are kept, however many views there are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Blend = Literal["uniform", "gaussian"]
Forward = Callable[[Tensor], Tensor]
"""(B, 3, H, W) image in 0..255 -> (B, K, H, W) logits."""


@dataclass(frozen=True)
class Inference:
    """How validation, test and prediction run the network over an image.

    Attributes:
        crop_size: Window (height, width) in pixels; None runs the whole image at once.
        stride: Window step (height, width) in pixels; None is two thirds of the window.
        scales: Factors on the height and width of the image; several are averaged.
        flip: Also run each view mirrored left to right, and average.
        blend: Weight of a window's pixels where windows overlap: "uniform" as MMSegmentation's, or
            "gaussian", which trusts a window's middle more than its border.

    >>> inference = Inference(crop_size=(4, 4), stride=(3, 3), flip=True)
    >>> inference(lambda image: image[:, :2].float(), torch.zeros(1, 3, 9, 7), (18, 14)).shape
    torch.Size([1, 2, 18, 14])
    """

    crop_size: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    blend: Blend = "uniform"

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales={self.scales}: give at least one factor, each above 0.")
        if self.blend not in get_args(Blend):
            raise ValueError(f"blend={self.blend!r}: give one of {', '.join(get_args(Blend))}.")
        if self.crop_size is None:
            if self.blend != "uniform":
                raise ValueError(f"blend={self.blend!r} needs a crop_size: there are no windows.")
            if self.stride is not None:
                raise ValueError(f"stride={self.stride} needs a crop_size to step with.")
            return
        steps = self.stride or self.crop_size
        if min(steps) < 1 or any(a > b for a, b in zip(steps, self.crop_size, strict=True)):
            raise ValueError(
                f"stride={self.stride} with crop_size={self.crop_size}: both must be at least 1,"
                " and"
                " the stride at most the crop, or pixels between windows would be left out."
            )

    @property
    def is_whole_image(self) -> bool:
        """Whether the network sees each image once, entire and as it is."""
        return self == Inference()

    @property
    def n_views(self) -> int:
        """How often the network sees each image."""
        return len(self.scales) * (2 if self.flip else 1)

    def __call__(self, network: Forward, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Score every class at every pixel.

        Args:
            network: Image to logits of the image's size.
            image: (B, 3, H, W), RGB in 0..255, uint8 or float.
            size: Height and width of the result.

        Returns:
            (B, K, *size): logits for a single view, mean softmax for several. The argmax over
            dimension 1 is the prediction.
        """
        views = list(product(self.scales, (False, True) if self.flip else (False,)))
        if len(views) == 1:
            return self._logits(network, image, size, *views[0])
        first, *others = views
        total = _softmax(self._logits(network, image, size, *first))
        for view in others:
            total += _softmax(self._logits(network, image, size, *view))
        return total.div_(len(views))

    def _logits(
        self, network: Forward, image: Tensor, size: tuple[int, int], scale: float, flip: bool
    ) -> Tensor:
        if scale != 1:
            height, width = (int(side * scale + 0.5) for side in image.shape[-2:])
            image = resize(image.float(), (height, width))
        if flip:
            image = image.flip(-1)
        if self.crop_size is None:
            logits = network(image)
        else:
            logits = slide(network, image, self.crop_size, self.stride, self.blend)
        return resize(logits.flip(-1) if flip else logits, size)


def _softmax(logits: Tensor) -> Tensor:
    """In float32 at least: means of half precision would tie classes that are not equal."""
    return logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bring (B, C, H, W) maps to `size` bilinearly, pixel centres aligned (align_corners=False).

    >>> resize(torch.zeros(1, 2, 4, 4), (3, 5)).shape
    torch.Size([1, 2, 3, 5])
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def slide(
    network: Forward,
    image: Tensor,
    crop_size: tuple[int, int],
    stride: tuple[int, int] | None = None,
    blend: Blend = "uniform",
) -> Tensor:
    """Average the logits of overlapping windows.

    Args:
        network: Window (B, 3, h, w) to logits (B, K, h, w).
        image: (B, 3, H, W).
        crop_size: Window (height, width) in pixels.
        stride: Window step (height, width) in pixels; None is two thirds of the window.
        blend: See `Inference`.

    Returns:
        (B, K, H, W), float32.
    """
    stride = stride or usual_stride(crop_size)
    height, width = image.shape[-2:]
    total: Tensor | None = None
    weights = torch.zeros(height, width, device=image.device)  # sum over the windows of a pixel
    rows, columns = (
        windows(height, crop_size[0], stride[0]),
        windows(width, crop_size[1], stride[1]),
    )
    for row, column in product(list(rows), list(columns)):
        logits = network(image[..., row, column])
        weight = window_weight(logits.shape[-2:], blend).to(image.device)
        if total is None:
            total = logits.new_zeros((*logits.shape[:2], height, width), dtype=torch.float32)
        total[..., row, column] += logits if blend == "uniform" else logits * weight
        weights[row, column] += weight
    assert total is not None
    return total.div_(weights)


def usual_stride(crop_size: tuple[int, int]) -> tuple[int, int]:
    """Step between windows where none is given: two thirds of the window."""
    return max(1, crop_size[0] * 2 // 3), max(1, crop_size[1] * 2 // 3)


def window_weight(size: Sequence[int], blend: Blend) -> Tensor:
    """Weight of each pixel of a window in the average over windows, float32 (h, w), above 0.

    A Gaussian's standard deviation is an eighth of the window's side, as in nnU-Net.

    >>> window_weight((1, 3), "gaussian")
    tensor([[0.0286, 1.0000, 0.0286]])
    """
    if blend == "uniform":
        return torch.ones(*size)
    bells = []
    for side in size:
        offset = torch.arange(side) - (side - 1) / 2
        bells.append(torch.exp(-0.5 * (offset / (side / 8)) ** 2))
    return bells[0][:, None] * bells[1]


def windows(length: int, crop: int, stride: int) -> Iterator[slice]:
    """Cut one axis into windows that cover it.

    Args:
        length: Length of the axis, pixels.
        crop: Length of a window.
        stride: Step between windows; the last one is moved back inside the axis.

    >>> [(window.start, window.stop) for window in windows(10, crop=4, stride=3)]
    [(0, 4), (3, 7), (6, 10)]
    >>> [(window.start, window.stop) for window in windows(3, crop=4, stride=3)]
    [(0, 3)]
    """
    n_windows = -(-max(length - crop, 0) // stride) + 1
    for index in range(n_windows):
        stop = min(index * stride + crop, length)
        yield slice(max(stop - crop, 0), stop)
