"""Where samples come from (`Source`) and what the loaders see (`SegmentationDataset`).

A source knows how to read the i-th image and mask as numpy arrays and nothing else; subsets,
caches and repetitions are sources around sources. The data set adds the transform and makes
tensors. A key is an index, or a pair (epoch, index) as the training sampler yields it: the epoch
travels with the index, so that persistent workers need not be told about it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypedDict, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from seglab.data.errors import DataError

Pixels = NDArray[np.uint8]
Shape = tuple[int, int]  # (height, width)
SizeOf = Callable[[Shape], Shape]
Transform = Callable[[Pixels, Pixels, int, int], tuple[Pixels, Pixels]]

IGNORE_INDEX = 255


class Shapes(NamedTuple):
    """Heights and widths of one sample: the image as the network gets it, and its mask."""

    image: Shape
    mask: Shape


class Sample(TypedDict):
    """One item: image uint8 (3, H, W) RGB, mask uint8 (H, W) with 255 = ignore, name."""

    image: Tensor
    mask: Tensor
    name: str


class Batch(TypedDict):
    """Collated samples: image uint8 (B, 3, H, W), mask uint8 (B, H, W), B names."""

    image: Tensor
    mask: Tensor
    name: list[str]


class Source(ABC):
    """The i-th image and mask of a split, as numpy arrays."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def read(self, index: int, epoch: int = 0) -> tuple[Pixels, Pixels]:
        """Return image (H, W, 3) RGB and mask (H, W), both uint8; files ignore the epoch."""

    def read_at_least(self, index: int, epoch: int, size_of: SizeOf) -> tuple[Pixels, Pixels]:
        """Read; the image may be decoded smaller than it is, but not below a size.

        Args:
            index: Which sample.
            epoch: As in `read`.
            size_of: Tells, for the sample's full shape, to what shape it will be resized.
        """
        return self.read(index, epoch)

    @abstractmethod
    def name(self, index: int) -> str:
        """A name that is unique within the split; results are written under it."""

    @abstractmethod
    def shapes(self, index: int) -> Shapes:
        """Image and mask shape without decoding any pixels."""

    def read_mask(self, index: int) -> Pixels:
        """Return the mask alone, uint8 (H, W)."""
        return self.read(index)[1]


class SegmentationDataset(Dataset[Sample]):
    """A source and a transform.

    Args:
        source: Where images and masks come from.
        transform: Called with (image, mask, epoch, index); None leaves both as they are.
        size_of: Tells from (epoch, index, shape) to what size the transform will resize first;
            then images that will shrink a lot may be decoded smaller. None: decode them whole.

    >>> from seglab.data.scenes import Scenes
    >>> sample = SegmentationDataset(Scenes(length=3, size=64))[1]
    >>> sample["image"].shape, sample["mask"].shape, sample["name"]
    (torch.Size([3, 64, 64]), torch.Size([64, 64]), 'scene_00001')
    """

    def __init__(
        self,
        source: Source,
        transform: Transform | None = None,
        size_of: Callable[[int, int, Shape], Shape] | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.size_of = size_of

    def __len__(self) -> int:
        return len(self.source)

    @overload
    def __getitem__(self, key: int | tuple[int, int]) -> Sample: ...

    @overload
    def __getitem__(self, key: list[int]) -> list[Sample]: ...

    def __getitem__(self, key: int | tuple[int, int] | list[int]) -> Sample | list[Sample]:
        """Return the sample for an index or (epoch, index); a list of samples for a list."""
        if isinstance(key, list):
            return [self[index] for index in key]
        epoch, index = key if isinstance(key, tuple) else (0, key)
        return self._sample(epoch, range(len(self))[index])  # range: negatives, IndexError

    def _sample(self, epoch: int, index: int) -> Sample:
        if self.size_of is None:
            image, mask = self.source.read(index, epoch)
        else:
            size_of = partial(self.size_of, epoch, index)
            image, mask = self.source.read_at_least(index, epoch, size_of)
        if self.transform is not None:
            image, mask = self.transform(image, mask, epoch, index)
        return {
            "image": _to_planes(image),
            "mask": torch.from_numpy(np.ascontiguousarray(mask)),
            "name": self.source.name(index),
        }


def _to_planes(image: Pixels) -> Tensor:
    """(H, W, 3) -> (3, H, W); OpenCV does it nine times as fast as numpy."""
    import cv2

    planes = np.empty((3, *image.shape[:2]), np.uint8)
    cv2.split(image, list(planes))
    return torch.from_numpy(planes)


def collate(samples: Sequence[Sample] | Sample) -> Batch:
    """Stack samples into a batch; they must agree in shape. A single sample is a batch of one.

    Raises:
        DataError: If images or masks differ in shape; names the files.
    """
    if isinstance(samples, dict):  # Lightning's overfit_batches puts in a sampler of its own
        samples = [samples]
    shapes = {(s["image"].shape, s["mask"].shape): s["name"] for s in samples}
    if len(shapes) > 1:
        listed = ", ".join(
            f"{name}: image {tuple(image)}, mask {tuple(mask)}"
            for (image, mask), name in shapes.items()
        )
        raise DataError(
            f"samples of different shapes cannot share a batch ({listed}); "
            "end the transforms with a fixed crop and seglab.data.transforms.Pad"
        )
    batch: Batch = default_collate(list(samples))
    return batch
