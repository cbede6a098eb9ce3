"""Which samples make up which batch: an endless training order and equal-shape batches.

Both classes derive from torch's `DistributedSampler`, for one reason: Lightning leaves such a
sampler alone on several devices, and would replace any other by one of its own, which pads the
validation set with repeated images and restarts the training order on resume.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from seglab.data.sources.source import Shapes


class EndlessSampler(DistributedSampler[Any]):
    """Endless concatenated permutations, cut into epochs; yields (pass, index).

    Sample number p of the run is entry ``p % n`` of the permutation of pass ``p // n``, drawn
    from ``default_rng([seed, pass])``: any position is found at once, nothing is replayed.
    Optimizer step number t takes positions ``t * G .. (t + 1) * G - 1`` (G: images of a step over
    all ranks and accumulated batches). They are dealt out in batches, first to the ranks, then to
    the next accumulated batch, so that the batches of a step too are the same for 8 ranks and for
    one that accumulates 8. An epoch is ``n // G`` steps; what it leaves over opens the next one,
    so within a pass nothing is dropped and nothing repeated (MMEngine's InfiniteSampler does the
    same; a plain `DistributedSampler` drops or repeats the rest of every epoch).

    Args:
        n_samples: Length of the data set.
        batch_size: Samples per batch on one rank.
        seed: Seed of the permutations.
        num_replicas: Number of ranks.
        rank: This rank.
        n_accumulated: Batches of one rank in one optimizer step.
        n_batches_done: Returns the number of batches of this rank already trained, or None where
            nobody counts; then the epoch (`set_epoch`) says where to start.

    Raises:
        ValueError: If the data set is empty.

    >>> sampler = EndlessSampler(5, batch_size=2, seed=0)
    >>> first = list(sampler); sampler.set_epoch(1); second = list(sampler)
    >>> len(sampler), sorted(index for pass_, index in first + second if pass_ == 0)
    (4, [0, 1, 2, 3, 4])
    """

    def __init__(
        self,
        n_samples: int,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        n_accumulated: int = 1,
        n_batches_done: Callable[[], int | None] = lambda: None,
    ) -> None:
        if not n_samples:
            raise ValueError("the training set is empty: there is nothing to draw from")
        super().__init__(_sized(n_samples), num_replicas, rank, seed=seed)
        self.n_samples = n_samples
        self.batch_size = batch_size
        self.n_accumulated = n_accumulated
        self.steps_per_epoch = max(1, n_samples // (batch_size * num_replicas * n_accumulated))
        self.n_batches_done = n_batches_done

    def __len__(self) -> int:
        """Samples of one epoch on this rank."""
        return self.steps_per_epoch * self.n_accumulated * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield one epoch of (pass, index), from where the run stands."""
        batches_per_epoch = self.steps_per_epoch * self.n_accumulated
        done = self.n_batches_done()
        first = self.epoch * batches_per_epoch if done is None else done
        for batch in range(first, first + batches_per_epoch):
            start = (batch * self.num_replicas + self.rank) * self.batch_size
            for position in range(start, start + self.batch_size):
                yield self.locate(position)

    def locate(self, position: int) -> tuple[int, int]:
        """Return (pass, index) of a position in the endless order."""
        pass_, offset = divmod(position, self.n_samples)
        return pass_, int(self._permutation(pass_)[offset])

    def _permutation(self, pass_: int) -> Any:
        cached = self.__dict__.get("_cached")
        if cached is None or cached[0] != pass_:
            order = np.random.default_rng([self.seed, pass_]).permutation(self.n_samples)
            cached = self._cached = (pass_, order)
        return cached[1]


class FirstSteps(EndlessSampler, SequentialSampler):  # type: ignore[misc]  # yields pairs
    """The beginning of the endless order again and again, for `trainer.overfit_batches`.

    Derives from `SequentialSampler`, because Lightning would replace any other by one that knows
    neither ranks nor steps.

    >>> sampler = FirstSteps(5, batch_size=2, seed=0, n_batches_done=lambda: 7)
    >>> list(sampler) == list(EndlessSampler(5, batch_size=2, seed=0))
    True
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.n_batches_done = lambda: 0


class EqualShapeBatches(DistributedSampler[Any], SequentialSampler):
    """Batches of indices for evaluation: every sample once, equal shapes within a batch.

    Padding to a common size would change the features near the border, so that a result would
    depend on which images happen to meet; here the numbers are those of batch size 1. Rank r
    takes every ``world``-th batch; nothing is repeated to make ranks even.

    Args:
        shapes: Image and mask shapes of every sample, or their number if all may be mixed
            (then `batch_size` must be 1).
        batch_size: Largest batch.
        num_replicas: Number of ranks.
        rank: This rank.

    Raises:
        ValueError: If there are fewer samples than ranks: a rank without a batch would leave
            the others waiting for it.

    >>> wide, tall = Shapes((32, 64), (32, 64)), Shapes((64, 32), (64, 32))
    >>> list(EqualShapeBatches([wide, tall, wide, wide], batch_size=2))
    [[0, 2], [3], [1]]
    """

    def __init__(
        self,
        shapes: Sequence[Shapes] | int,
        batch_size: int = 1,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        n_samples = shapes if isinstance(shapes, int) else len(shapes)
        if n_samples < num_replicas:
            raise ValueError(
                f"{n_samples} image(s) cannot be shared by {num_replicas} devices: "
                "each needs at least one; use fewer devices or more images"
            )
        super().__init__(_sized(n_samples), num_replicas, rank, shuffle=False)
        keys: Sequence[object] = [None] * n_samples if isinstance(shapes, int) else shapes
        batches = _group(keys, batch_size)
        if len(batches) < num_replicas:  # few images: smaller batches, so that no rank is idle
            batches = _group(keys, 1)
        self.batches = batches[rank::num_replicas]

    def __len__(self) -> int:
        """Batches on this rank."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        """Yield lists of indices."""
        return iter(self.batches)


def _sized(n_samples: int) -> Dataset[Any]:
    return cast("Dataset[Any]", range(n_samples))  # its length is all the base class looks at


def _group(keys: Sequence[object], batch_size: int) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
