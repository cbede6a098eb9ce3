"""Training transforms against plain numpy/OpenCV versions of the recipe's sentences."""

import itertools
from typing import Any

import cv2
import numpy as np
import pytest

from seglab.data import transforms as ours
from seglab.data.transforms.resizing import resize_image, resize_image_window

N_DRAWS = 400


def seeded(transform: Any, seed: int = 0) -> Any:
    """The transform with a generator of its own, as `Augment` would give it."""
    transform.set_random_seed(seed)
    return transform


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def recipe_size(height: int, width: int, ratio: float, base: tuple[int, int]) -> tuple[int, int]:
    """mmcv: box = int(scale * ratio) per side; factor = min over sides; side = int(x * f + 0.5)."""
    box = [int(side * ratio) for side in base]
    factor = min(max(box) / max(height, width), min(box) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (20, 90)])
def test_resize_follows_the_drawn_box(shape: tuple[int, int]) -> None:
    for ratio in (0.5, 0.77, 1.0, 1.9):
        image, mask = picture(*shape), np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        result = ours.RandomResize((128, 64), (ratio, ratio))(image=image, mask=mask)
        size = recipe_size(*shape, ratio, (128, 64))
        assert (result["image"] == cv2.resize(image, size[::-1])).all()
        assert (result["mask"] == cv2.resize(mask, size[::-1], interpolation=0)).all()


def test_resize_ratios_are_uniform() -> None:
    transform = seeded(ours.RandomResize((1000, 1000)))
    image = np.zeros((100, 100, 3), np.uint8)
    ratios = [len(transform(image=image)["image"]) / 1000 for _ in range(N_DRAWS)]
    expected = np.linspace(0.5, 2.0, N_DRAWS)
    # Kolmogorov: 1.95 / sqrt(n) is exceeded by one sample in a thousand
    assert abs(np.sort(ratios) - expected).max() / 1.5 < 1.95 / N_DRAWS**0.5
    assert min(ratios) >= 0.499
    assert max(ratios) <= 2.0


def test_resize_without_scale_uses_the_image() -> None:
    result = ours.RandomResize(None, (1.5, 1.5))(image=picture(20, 30))
    assert result["image"].shape == (30, 45, 3)


def test_crop_positions_are_uniform_and_reach_the_ends() -> None:
    transform = seeded(ours.RandomCrop(4, 6, cat_max_ratio=1.0))
    mask = np.arange(8 * 9, dtype=np.uint8).reshape(8, 9)
    corners = [
        divmod(int(transform(image=picture(8, 9), mask=mask)["mask"][0, 0]), 9)
        for _ in range(N_DRAWS)
    ]
    counts = np.zeros((5, 4))
    np.add.at(counts, tuple(np.transpose(corners)), 1)
    expected = N_DRAWS / counts.size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, one in a thousand


def test_crop_keeps_image_and_mask_together() -> None:
    image = picture(20, 30)
    mask = image[..., 0].copy()
    result = seeded(ours.RandomCrop(7, 11))(image=image, mask=mask)
    assert (result["image"][..., 0] == result["mask"]).all()
    assert result["mask"].shape == (7, 11)


def share_rule(mask: np.ndarray) -> bool:
    """Recipe: more than one non-ignored class and the largest share below 0.75."""
    values, counts = np.unique(mask[mask != 255], return_counts=True)
    return len(values) > 1 and counts.max() / counts.sum() < 0.75


def test_crop_redraws_like_the_recipe() -> None:
    """Ten redraws: a window that is good with chance q stays bad with chance (1 - q)^11."""
    mask = np.zeros((8, 1000), np.uint8)
    mask[:, 100:110] = 1
    mask[:, 300:600] = 255
    windows = [mask[:, left : left + 16] for left in range(1000 - 16 + 1)]
    chance = np.mean([share_rule(window) for window in windows])
    transform = seeded(ours.RandomCrop(8, 16))
    image = np.zeros((8, 1000, 3), np.uint8)
    good = np.mean(
        [share_rule(transform(image=image, mask=mask)["mask"]) for _ in range(2 * N_DRAWS)]
    )
    expected = 1 - (1 - chance) ** 11
    assert 0.05 < expected < 0.95
    assert abs(good - expected) < 3.3 * (expected * (1 - expected) / (2 * N_DRAWS)) ** 0.5


def test_share_of_exactly_the_limit_is_too_much() -> None:
    quarter = np.uint8([[0, 0, 0, 1]])
    assert not ours.has_mixed_classes(quarter, 0.75)
    assert ours.has_mixed_classes(quarter, 0.76)
    assert not ours.has_mixed_classes(np.uint8([[3, 3, 255, 255]]), 0.75)


@pytest.mark.parametrize("shape", [(60, 80), (24, 32), (200, 120)])
def test_fused_resize_and_crop_equal_the_two(shape: tuple[int, int]) -> None:
    image = cv2.GaussianBlur(picture(*shape), (0, 0), 1)
    mask = (picture(*shape)[..., 0] // 40) * np.uint8(1)
    for seed in range(40):
        fused = seeded(ours.RandomResizeCrop(40, 30, (160, 100)), seed)(image=image, mask=mask)
        first = seeded(ours.RandomResize((160, 100)), seed)
        resized = first(image=image, mask=mask)
        crop = ours.RandomCrop(40, 30)
        crop.set_random_state(first.random_generator, first.py_random)  # goes on where it ended
        expected = crop(**resized)
        assert (fused["mask"] == expected["mask"]).all()
        assert abs(fused["image"].astype(int) - expected["image"]).max() <= 1


def distort_in_float(image: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """The recipe, step by step: float arithmetic, clip, cut; a conversion for every HSV step."""

    def step(values: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        scaled = values.astype(np.float32) * alpha + beta
        return np.clip(scaled, 0, 255).astype(np.uint8)

    def contrast(values: np.ndarray) -> np.ndarray:
        return values if params["contrast"] is None else step(values, params["contrast"])

    if params["shift"] is not None:
        image = step(image, beta=params["shift"])
    if params["contrast_first"]:
        image = contrast(image)
    if params["saturation"] is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = step(hsv[..., 1], params["saturation"])
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if params["hue"] is not None:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + params["hue"]) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if params["contrast_first"] else contrast(image)


def test_distortion_equals_the_arithmetic() -> None:
    transform = seeded(ours.PhotoMetricDistortion())
    image = cv2.GaussianBlur(picture(40, 40), (0, 0), 2)
    for _ in range(60):
        result = transform(image=image)["image"]
        assert (result == distort_in_float(image, transform.params)).all(), transform.params


def test_computing_only_the_window_adds_no_bias() -> None:
    """Oracle: bilinear interpolation in double precision."""
    image = cv2.GaussianBlur(picture(120, 160), (0, 0), 1)
    shape, window = (193, 257), (60, 70, 48, 40)
    rows, columns = (
        np.clip((np.arange(start, start + n) + 0.5) * size / resized - 0.5, 0, size - 1)
        for start, n, size, resized in zip(window, window[2:], image.shape, shape, strict=False)
    )
    y, x = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - y)[:, None, None], (columns - x)[None, :, None]
    between = image[y] * (1 - down) + image[y + 1] * down
    expected = between[:, x] * (1 - right) + between[:, x + 1] * right
    found = resize_image_window(image, shape, window)
    assert abs(found - expected).max() < 1
    assert abs((found - expected).mean()) < 0.02
    whole = resize_image(image, shape)[60:108, 70:110]
    assert abs(found.astype(int) - whole).max() <= 1


def test_distortion_draws_the_recipes_ranges() -> None:
    transform = seeded(ours.PhotoMetricDistortion())
    image = picture(2, 2)
    draws = []
    for _ in range(1000):
        transform(image=image)
        draws.append(transform.params)
    for key, low, high in (
        ("shift", -32, 32),
        ("contrast", 0.5, 1.5),
        ("saturation", 0.5, 1.5),
        ("hue", -18, 17),
    ):
        values = np.array([draw[key] for draw in draws if draw[key] is not None])
        assert abs(len(values) - 500) < 55  # p = 1/2: 3.5 standard deviations
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
    assert abs(sum(draw["contrast_first"] for draw in draws) - 500) < 55
    assert {draw["hue"] for draw in draws} == {None, *range(-18, 18)}


def test_distortion_draws_its_steps_independently() -> None:
    transform = seeded(ours.PhotoMetricDistortion())
    image = picture(2, 2)
    keys = ("shift", "contrast", "saturation", "hue")
    draws = np.full((4000, len(keys)), np.nan)
    for row in draws:
        transform(image=image)
        row[:] = [np.nan if (x := transform.params[key]) is None else x for key in keys]
    is_left_out = np.isnan(draws)
    for first, second in itertools.combinations(range(len(keys)), 2):
        both = draws[~is_left_out[:, [first, second]].any(axis=1)]
        assert abs(np.corrcoef(both[:, first], both[:, second])[0, 1]) < 4 / len(both) ** 0.5
        coins = is_left_out[:, first], is_left_out[:, second]
        assert abs(np.corrcoef(*coins)[0, 1]) < 4 / len(draws) ** 0.5


def test_pad_fills_right_and_bottom_only() -> None:
    image, mask = picture(3, 4), np.zeros((3, 4), np.uint8)
    result = ours.Pad(5, 4, fill=(1, 2, 3))(image=image, mask=mask)
    assert (result["image"][:3] == image).all()
    assert (result["image"][3:] == (1, 2, 3)).all()
    assert (result["mask"][3:] == 255).all()
    assert (result["mask"][:3] == 0).all()


def test_standard_recipe_gives_the_crop_size() -> None:
    from albumentations import Compose

    recipe = Compose(ours.standard_transforms((32, 48), (64, 32)))
    for shape in ((20, 90), (90, 20), (200, 200)):
        result = recipe(image=picture(*shape), mask=np.zeros(shape, np.uint8))
        assert result["image"].shape == (32, 48, 3)
        assert result["mask"].shape == (32, 48)


def test_impossible_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ratio=\(2, 0.5\) .*two rising positive"):
        ours.RandomResize(ratio=(2, 0.5))
