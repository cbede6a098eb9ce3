"""A sample's augmentation depends on (seed, epoch, index) and on nothing else."""

import random
from itertools import product

import numpy as np
import pytest
from albumentations import HorizontalFlip, Normalize, OneOf, RandomBrightnessContrast, VerticalFlip

from seglab.data.transforms import standard_transforms
from seglab.data.transforms.augment import Augment

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
MASK = (np.arange(40 * 60).reshape(40, 60) % 5).astype(np.uint8)


def test_order_of_calls_does_not_matter() -> None:
    keys = list(product(range(3), range(4)))
    forward, backward = (Augment(standard_transforms((32, 32)), seed=1) for _ in range(2))
    first = {key: forward(IMAGE, MASK, *key) for key in keys}
    np.random.seed(9)
    random.seed(9)
    for key in reversed(keys):
        image, mask = backward(IMAGE, MASK, *key)
        assert (image == first[key][0]).all()
        assert (mask == first[key][1]).all()


def test_every_key_and_seed_differs() -> None:
    results = {
        Augment(standard_transforms((32, 32)), seed)(IMAGE, MASK, epoch, index)[0].tobytes()
        for seed, epoch, index in product(range(2), range(3), range(10))
    }
    assert len(results) == 60


def test_transforms_have_independent_streams() -> None:
    """Two flips, 1000 samples: sharing a stream would tie them together (correlation 1)."""
    augment = Augment([HorizontalFlip(p=0.5), VerticalFlip(p=0.5)], seed=0)
    image = np.zeros((2, 2, 3), np.uint8)
    corners = np.uint8([[0, 1], [2, 3]])
    first = np.array([augment(image, corners, 0, index)[1][0, 0] for index in range(1000)])
    horizontal, vertical = first % 2, first // 2
    assert abs(np.corrcoef(horizontal, vertical)[0, 1]) < 0.1
    assert abs(horizontal.mean() - 0.5) < 0.05
    assert abs(vertical.mean() - 0.5) < 0.05


def test_same_transform_twice_draws_twice() -> None:
    augment = Augment([HorizontalFlip(p=0.5), HorizontalFlip(p=0.5)], seed=0)
    image, mask = np.zeros((1, 2, 3), np.uint8), np.uint8([[0, 1]])
    flipped = np.mean([augment(image, mask, 0, index)[1][0, 0] for index in range(400)])
    assert abs(flipped - 0.5) < 0.1  # one stream for both would never flip


def test_containers_are_seeded_within() -> None:
    parts = [OneOf([HorizontalFlip(p=1), RandomBrightnessContrast(p=1)], p=0.7)]
    first, again = Augment(parts, seed=0), Augment(parts, seed=0)
    for index in range(20):
        expected = first(IMAGE, MASK, 0, index)[0].copy()
        assert (again(IMAGE, MASK, 0, index)[0] == expected).all()


def test_float_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'Normalize'.*the image into float32; keep uint8"):
        Augment([Normalize()])(IMAGE, MASK, 0, 0)
