"""What the loaders see (`SegmentationDataset`): a source and a transform, as tensors.

A source (`sources/source.py`) knows how to read the i-th image and mask as numpy arrays and nothing
else; subsets, caches and repetitions are sources around sources. A key is an index, or a pair
(epoch, index) as the training sampler yields it: the epoch travels with the index, so that
persistent workers need not be told about it.
"""

from collections.abc import Callable, Sequence
from typing import TypedDict, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from seglab.data.errors import DataError
from seglab.data.sources.source import Pixels, Source

Transform = Callable[[Pixels, Pixels, int, int], tuple[Pixels, Pixels]]


class Sample(TypedDict):
    """One item: image (C, H, W) in 0..255, mask uint8 (H, W) with 255 = ignore, name.

    Images are uint8, RGB if C is 3; float32 where the data module has a value range.
    """

    image: Tensor
    mask: Tensor
    name: str


class Batch(TypedDict):
    """Collated samples: image uint8 or float32 (B, C, H, W), mask uint8 (B, H, W), B names."""

    image: Tensor
    mask: Tensor
    name: list[str]


class SegmentationDataset(Dataset[Sample]):
    """A source and a transform.

    Args:
        source: Where images and masks come from.
        transform: Called with (image, mask, epoch, index); None leaves both as they are.

    >>> from seglab.data.scenes import Scenes
    >>> sample = SegmentationDataset(Scenes(length=3, size=64))[1]
    >>> sample["image"].shape, sample["mask"].shape, sample["name"]
    (torch.Size([3, 64, 64]), torch.Size([64, 64]), 'scene_00001')
    """

    def __init__(self, source: Source, transform: Transform | None = None) -> None:
        self.source = source
        self.transform = transform

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
        image, mask = self.source.read(index, epoch)
        if self.transform is not None:
            image, mask = self.transform(image, mask, epoch, index)
        return {
            "image": _to_planes(image),
            "mask": torch.from_numpy(np.ascontiguousarray(mask)),
            "name": self.source.name(index),
        }


def _to_planes(image: Pixels) -> Tensor:
    """(H, W, C) -> (C, H, W); OpenCV does it nine times as fast as numpy."""
    import cv2

    planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
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
