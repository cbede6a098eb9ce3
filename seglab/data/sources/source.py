"""What every source of samples is: the i-th image and mask of a split, as numpy arrays."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Shape = tuple[int, int]  # (height, width)

IGNORE_INDEX = 255


class Shapes(NamedTuple):
    """Heights and widths of one sample: the image as the network gets it, and its mask."""

    image: Shape
    mask: Shape


class Source(ABC):
    """The i-th image and mask of a split, as numpy arrays."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def read(self, index: int, epoch: int = 0) -> tuple[Pixels, Pixels]:
        """Return image (H, W, 3) RGB and mask (H, W), both uint8; files ignore the epoch."""

    @abstractmethod
    def name(self, index: int) -> str:
        """A name that is unique within the split; results are written under it."""

    @abstractmethod
    def shapes(self, index: int) -> Shapes:
        """Image and mask shape without decoding any pixels."""

    def read_mask(self, index: int) -> Pixels:
        """Return the mask alone, uint8 (H, W)."""
        return self.read(index)[1]


class SourceWrapper(Source):
    """A source around another; passes everything on, for subclasses to change what they mean to.

    Args:
        source: Where the samples come from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, epoch: int = 0) -> tuple[Pixels, Pixels]:
        """Read from the inner source."""
        return self.source.read(index, epoch)

    def read_mask(self, index: int) -> Pixels:
        """Read the mask alone from the inner source."""
        return self.source.read_mask(index)

    def name(self, index: int) -> str:
        """Return the inner source's name."""
        return self.source.name(index)

    def shapes(self, index: int) -> Shapes:
        """Return the inner source's shapes."""
        return self.source.shapes(index)
