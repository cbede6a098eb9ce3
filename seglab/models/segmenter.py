"""The network contract, and `Segmenter`: normalization, encoder, decode head, auxiliary head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from seglab.models.encoders import Encoder
from seglab.models.heads.base import Head
from seglab.models.mmseg import from_mmseg, is_mmseg
from seglab.operators.resampling import Resampling

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB in 0..255, as MMSegmentation's configs have it
IMAGENET_STD = (58.395, 57.12, 57.375)


class Network(nn.Module, ABC):
    """What the task trains: RGB image in 0..255 in, logits out, normalization inside.

    Attributes:
        num_classes: K, the number of logits.
        in_channels: Bands of the image.
        upsampling: How `forward` resizes the first of `decode`'s logits to the image, where that is
            all it does. Evaluation then never holds logits at the size of image or label.
    """

    num_classes: int
    in_channels: int = 3
    upsampling: Resampling | None = None

    @abstractmethod
    def decode(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return logits at head resolution: the main ones, then (in training) auxiliary ones."""

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Map a uint8 or float RGB image in 0..255, (B, 3, H, W), to logits (B, K, H, W)."""

    def translate_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Bring a state dict from elsewhere into this network's names, where it knows how."""
        return state


class Normalize(nn.Module):
    """(image - mean) / std per channel, on the device of the network; accepts uint8.

    The buffers are not persistent, so that state-dict keys stay those of MMSegmentation.

    >>> white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    >>> Normalize((0, 0, 0), (255, 255, 255))(white).max()
    tensor(1.)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1).float(), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1).float(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Normalize (B, C, H, W) in 0..255.

        Raises:
            ValueError: not a batch of images of C bands, or neither uint8 nor floating point.
        """
        if image.ndim != 4 or image.shape[1] != self.mean.shape[1]:
            bands = self.mean.shape[1]
            raise ValueError(
                f"expected an image of shape (B, {bands}, H, W), got {tuple(image.shape)}"
            )
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ValueError(
                f"expected a uint8 or floating-point image in 0..255, got {image.dtype}"
            )
        return (image.to(self.mean.dtype) - self.mean) / self.std


def refuse_other_bands(network: nn.Module, data: object) -> None:
    """Compare the bands of a data module, if it tells, with what the network takes.

    Raises:
        ValueError: They differ.
    """
    given, taken = getattr(data, "channels", None), getattr(network, "in_channels", None)
    if given is not None and taken is not None and given != taken:
        raise ValueError(
            f"the data has images of {given} band(s), but the network takes {taken}: set "
            f"in_channels of the encoder (of SmpNetwork) to {given}, with mean and std per band, "
            f"or data.channels to {taken}"
        )


def check_bands(
    mean: Sequence[float], std: Sequence[float], in_channels: int
) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation, if they are one number for each band.

    Raises:
        ValueError: They are not, or a deviation is not positive.
    """
    if not len(mean) == len(std) == in_channels:
        raise ValueError(
            f"mean has {len(mean)} and std {len(std)} values, but the network takes images of "
            f"{in_channels} band(s): give one of each per band (`doctor` prints them), or set "
            "in_channels"
        )
    if min(std) <= 0:
        raise ValueError(f"std {list(std)} must be positive: leave out a band that never changes")
    return mean, std


class Segmenter(Network):
    """Normalization, encoder, decode head and, in training, an auxiliary head.

    State-dict prefixes are `encoder.`, `decode_head.` and `auxiliary_head.`; below the last two the
    keys are MMSegmentation's.

    Args:
        encoder: maps a normalized image to features; knows its `channels`.
        head: a decode head, or a factory called with (encoder.channels, num_classes), which is what
            YAML gives.
        auxiliary: as `head`, for the auxiliary loss; run only by `decode` in training.
        num_classes: K; may be left out if `head` is a module already.
        mean: per band, in 0..255; ImageNet's RGB when left out.
        std: per band, in 0..255.
        align_corners: how the logits are brought to the image's size.

    Raises:
        ValueError: no number of classes, heads and number of classes that disagree, or a mean of
            another number of bands than the encoder takes.

    >>> from functools import partial
    >>> from seglab.models import TimmEncoder
    >>> from seglab.models.heads import FCNHead
    >>> head = partial(FCNHead, channels=8)
    >>> network = Segmenter(TimmEncoder("resnet18"), head, num_classes=4)
    >>> network(torch.zeros(1, 3, 33, 50, dtype=torch.uint8)).shape
    torch.Size([1, 4, 33, 50])
    """

    def __init__(
        self,
        encoder: Encoder,
        head: Callable[[Sequence[int], int], Head],
        auxiliary: Callable[[Sequence[int], int], Head] | None = None,
        num_classes: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = getattr(encoder, "in_channels", 3)
        self.normalize = Normalize(*check_bands(mean, std, self.in_channels))
        self.encoder = encoder
        self.decode_head = _build_head("head", head, encoder.channels, num_classes)
        self.num_classes = _count_classes(self.decode_head, num_classes)
        self.auxiliary_head = (
            None
            if auxiliary is None
            else _build_head("auxiliary", auxiliary, encoder.channels, self.num_classes)
        )
        self.upsampling = Resampling(align_corners=align_corners)

    def decode(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return (main, auxiliary) logits in training, (main,) otherwise, at head resolution."""
        features = self.encoder(self.normalize(image))
        logits: Tensor = self.decode_head(features)
        if self.training and self.auxiliary_head is not None:
            return logits, self.auxiliary_head(features)
        return (logits,)

    def forward(self, image: Tensor) -> Tensor:
        """Map a uint8 or float RGB image in 0..255, (B, 3, H, W), to logits (B, K, H, W).

        Logits are resized to the image as in MMSegmentation, without cropping what an encoder
        padded.
        """
        logits = self.decode_head(self.encoder(self.normalize(image)))
        assert self.upsampling is not None
        return self.upsampling(logits, (image.shape[-2], image.shape[-1]))

    def translate_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take MMSegmentation's checkpoints besides our own."""
        return from_mmseg(self, state) if is_mmseg(state) else state


def _build_head(
    role: str,
    head: Callable[[Sequence[int], int], Head],
    channels: Sequence[int],
    num_classes: int | None,
) -> nn.Module:
    if isinstance(head, nn.Module):
        ready: nn.Module = head
        found = getattr(ready, "num_classes", num_classes)
        if num_classes not in (None, found):
            raise ValueError(
                f"`{role}` makes {found} logits but num_classes is {num_classes}: make them equal"
            )
        return ready
    if num_classes is None:
        raise ValueError(f"`{role}` is a factory: num_classes must say how many logits to make")
    return head(channels, num_classes)


def _count_classes(head: nn.Module, num_classes: int | None) -> int:
    count = getattr(head, "num_classes", num_classes)
    if count is None:
        raise ValueError(f"{type(head).__name__} does not say its num_classes: give it yourself")
    return int(count)
