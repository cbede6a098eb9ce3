"""The endless order and the equal-shape batches, against brute force."""

from itertools import chain, islice

import pytest

from seglab.data.sampler import EndlessSampler, EqualShapeBatches
from seglab.data.sources.source import Shapes


def run(n_samples: int, n_epochs: int, world: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """What each step sees over all ranks, in rank order within a step."""
    samplers = [EndlessSampler(n_samples, batch_size, 7, world, rank) for rank in range(world)]
    steps = []
    for epoch in range(n_epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        streams = [iter(sampler) for sampler in samplers]
        for _ in range(samplers[0].steps_per_epoch):
            step = [islice(stream, batch_size) for stream in streams]
            steps.append(list(chain.from_iterable(step)))
    return steps


def test_each_pass_holds_every_sample_once() -> None:
    seen = [key for step in run(11, n_epochs=9, world=1, batch_size=4) for key in step]
    for number in range(len(seen) // 11):
        entries = seen[number * 11 : (number + 1) * 11]
        assert {pass_ for pass_, _ in entries} == {number}
        assert sorted(index for _, index in entries) == list(range(11))


def test_passes_have_orders_of_their_own() -> None:
    seen = [index for step in run(11, 9, 1, 4) for _, index in step]
    assert len({tuple(seen[start : start + 11]) for start in range(0, 55, 11)}) == 5


@pytest.mark.parametrize(("world", "batch_size"), [(1, 4), (2, 2), (4, 1)])
def test_steps_do_not_depend_on_the_rank_layout(world: int, batch_size: int) -> None:
    expected = run(11, 5, world=1, batch_size=4)
    assert [sorted(step) for step in run(11, 5, world, batch_size)] == [
        sorted(step) for step in expected
    ]


def test_order_continues_after_the_steps_done() -> None:
    whole = list(EndlessSampler(10, 2, seed=3))
    resumed = list(EndlessSampler(10, 2, seed=3, n_batches_done=lambda: 3))
    assert resumed[:4] == whole[6:]


def test_batch_larger_than_the_set_still_trains() -> None:
    sampler = EndlessSampler(3, batch_size=8)
    keys = list(sampler)
    assert len(keys) == len(sampler) == 8
    assert len(set(keys)) == 8
    assert [pass_ for pass_, _ in keys] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_empty_training_set_is_refused() -> None:
    with pytest.raises(ValueError, match="training set is empty"):
        EndlessSampler(0, 2)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_evaluation_sees_each_image_once(world: int, batch_size: int) -> None:
    shapes = [Shapes((8, 8 + n % 3), (8, 8 + n % 2)) for n in range(7)]
    ranks = [list(EqualShapeBatches(shapes, batch_size, world, rank)) for rank in range(world)]
    assert all(ranks)
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(7))
    for batch in (batch for batches in ranks for batch in batches):
        assert len(batch) <= batch_size
        assert len({shapes[index] for index in batch}) == 1


def test_more_devices_than_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 image\(s\) cannot be shared by 3 devices"):
        EqualShapeBatches(2, 1, 3, 0)
