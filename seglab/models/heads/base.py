"""What all decode heads share: dropout and the classifying 1x1 convolution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Head(nn.Module, ABC):
    """A decode head: the encoder's features in, logits at the head's resolution out.

    A head receives the whole list of features and picks what it needs. It ends with dropout of
    whole channels and `conv_seg`, initialized N(0, 0.01) as in MMSegmentation's `decode_head.py`.

    Args:
        in_channels: channels of every encoder level, fine to coarse.
        num_classes: K, the number of logits.
        channels: width of the map that `conv_seg` reads.
        dropout: probability that a whole channel is zeroed in training.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.num_classes = num_classes
        self.channels = channels
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]  # bias=True is the default

    def classify(self, x: Tensor) -> Tensor:
        """Map (B, channels, h, w) to logits (B, num_classes, h, w)."""
        logits: Tensor = self.conv_seg(self.dropout(x))
        return logits

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the encoder's features, (B, C_i, h_i, w_i) fine to coarse, to logits (B, K, h, w)."""
