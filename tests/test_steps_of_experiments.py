"""The 26 experiments counted through on 1, 2, 4 and 8 devices: the stated training on each."""

from __future__ import annotations

from pathlib import Path

import pytest
from steps import DEVICES, Setup, read_setup, simulate

CONFIGS = Path(__file__).parents[1] / "configs"
UPERNET = [
    f"upernet_{name}"
    for name in (
        *("swin_t", "swin_s", "swin_b", "twins_svt_s", "twins_svt_b", "twins_svt_l"),
        *("convnext_t", "convnext_s", "convnext_b"),
    )
]
R101 = ["fcn_r101", "pspnet_r101", "deeplabv3_r101", "deeplabv3plus_r101"]

# MMSegmentation's configs at b040e147: images of the training set, images per GPU, GPUs,
# iterations, iterations between validations. VOC 2012 aug is trained as ADE20K ("the same goes").
STATED = {
    **{f"ade20k/{name}": (20210, 2, 8, 160_000, 16_000) for name in UPERNET},
    **{f"voc_aug/{name}": (10582, 2, 8, 160_000, 16_000) for name in UPERNET},
    **{f"ade20k/{name}": (20210, 4, 4, 160_000, 16_000) for name in R101},
    **{f"cityscapes/{name}": (2975, 2, 4, 80_000, 8_000) for name in R101},
}


def test_there_are_26_experiments() -> None:
    assert len(STATED) == 26
    assert all((CONFIGS / f"{name}.yaml").exists() for name in STATED)


@pytest.mark.parametrize("name", STATED)
def test_config_states_the_published_training(name: str) -> None:
    n_images, per_gpu, gpus, steps, interval = STATED[name]
    expected = Setup(n_images, per_gpu, per_gpu * gpus, steps, interval)
    assert read_setup(CONFIGS / f"{name}.yaml") == expected


def assert_stated(setup: Setup, n_devices: int, accumulate: int = 1) -> None:
    found = simulate(setup, n_devices, accumulate)
    assert found.steps == setup.max_steps
    assert found.least_images == found.most_images == setup.total_batch
    every = range(setup.interval, setup.max_steps + 1, setup.interval)
    assert found.validations == tuple(every)
    assert found.last_checkpoint == setup.max_steps


@pytest.mark.parametrize("n_devices", DEVICES)
@pytest.mark.parametrize("name", STATED)
def test_few_epochs_are_the_stated_ones_on_any_devices(name: str, n_devices: int) -> None:
    """Cut to four epochs, with intervals that divide nothing."""
    n_images, per_gpu, gpus, *_ = STATED[name]
    total = per_gpu * gpus
    epoch = n_images // total
    setup = Setup(n_images, per_gpu, total, 4 * epoch + epoch // 3, epoch // 2 + 1)
    found = simulate(setup, n_devices)
    assert (found.steps, found.last_checkpoint) == (setup.max_steps, setup.max_steps)
    assert found.least_images == found.most_images == total
    every = {*range(setup.interval, setup.max_steps, setup.interval), setup.max_steps}
    assert found.validations == tuple(sorted(every))


@pytest.mark.slow
@pytest.mark.parametrize("n_devices", DEVICES)
@pytest.mark.parametrize("name", STATED)
def test_whole_training_is_the_stated_one_on_any_devices(name: str, n_devices: int) -> None:
    assert_stated(read_setup(CONFIGS / f"{name}.yaml"), n_devices)


def test_right_accumulation_given_changes_nothing() -> None:
    setup = Setup(20210, 2, 16, 4_000, 1_600)
    assert simulate(setup, 1, accumulate=8) == simulate(setup, 1)
    assert simulate(setup, 1).validations == (1_600, 3_200, 4_000)
