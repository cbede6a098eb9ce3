"""A chain of albumentations transforms whose randomness is a function of (seed, epoch, index).

albumentations 2.0.8 by itself draws from generators that live in the transforms: every loader
worker starts with the same copy, `Compose(seed=...)` gives all transforms one and the same
stream (so that, for instance, a horizontal and a vertical flip always happen together), and a
resumed run starts over. Here each transform gets a fresh generator for each sample, seeded with
(seed, epoch, index, position in the chain). Fresh generators cost 12 microseconds a transform,
about 2 % of a sample.
"""

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from seglab.data.errors import DataError
from seglab.data.sources.source import Pixels

if TYPE_CHECKING:
    from albumentations import BaseCompose, BasicTransform


class Augment:
    """Apply transforms to image and mask; the same (epoch, index) gives the same result.

    Args:
        transforms: albumentations transforms, containers such as OneOf included.
        seed: Together with (epoch, index) it fixes all draws.

    Raises:
        DataError: In a call, if a transform changes the type of the pixels.

    >>> from albumentations import RandomCrop
    >>> augment = Augment([RandomCrop(2, 2)], seed=0)
    >>> image, mask = np.zeros((9, 9, 3), np.uint8), np.arange(81, dtype=np.uint8).reshape(9, 9)
    >>> first, again = (augment(image, mask, epoch=3, index=5)[1] for _ in range(2))
    >>> (first == again).all(), first.shape
    (np.True_, (2, 2))
    """

    def __init__(self, transforms: "Sequence[BasicTransform | BaseCompose]", seed: int = 0) -> None:
        from albumentations import Compose

        self.seed = seed
        # sizes were compared when the files were read
        self.compose = Compose(list(transforms), is_check_shapes=False)
        self.parts = [part for transform in self.compose for part in walk(transform)]

    def __call__(
        self, image: Pixels, mask: Pixels, epoch: int, index: int
    ) -> tuple[Pixels, Pixels]:
        """Transform image (H, W, C), uint8 or float32 in 0..255, and mask (H, W), uint8."""
        for position, part in enumerate(self.parts):
            # assigned, not passed to set_random_state: a container would hand it to its children
            part.random_generator, part.py_random = self._streams(epoch, index, position)
        result = self.compose(image=image, mask=mask)
        _check_pixels(result, image.dtype, self.compose)
        return result["image"], result["mask"]

    def _streams(
        self, epoch: int, index: int, position: int
    ) -> tuple[np.random.Generator, random.Random]:
        rng = np.random.default_rng([self.seed, epoch, index, position])
        return rng, random.Random(int(rng.integers(2**62)))


def walk(part: Any) -> Iterator[Any]:
    """Yield a transform and, of a container, all that it holds."""
    yield part
    for child in getattr(part, "transforms", ()):
        yield from walk(child)


def _check_pixels(result: dict[str, Any], dtype: Any, compose: Any) -> None:
    for key, wanted in (("image", dtype), ("mask", np.dtype(np.uint8))):
        kind = getattr(result[key], "dtype", type(result[key]))
        if not isinstance(result[key], np.ndarray) or kind != wanted:
            names = [type(transform).__name__ for transform in compose]
            raise DataError(
                f"data.transforms {names} turned the {key} into {kind}; keep {wanted} arrays: "
                "normalization is the network's first layer, and the loader makes the tensors"
            )
