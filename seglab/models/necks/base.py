"""What all necks share: their signature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn


class Neck(nn.Module, ABC):
    """A feature pyramid: the encoder's features in, maps of equal width out.

    Built as `Neck(in_channels, channels, ...)`. In YAML, heads take one as a class path.

    Attributes:
        channels: of every map it returns, fine to coarse.
    """

    channels: tuple[int, ...]

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map the encoder's features, (B, C_i, h_i, w_i) fine to coarse, to the pyramid's."""
