"""Generated scenes: seeded, endless, and made as their recipe says."""

import numpy as np
import pytest

from seglab.data import ScenesDataModule
from seglab.data.scenes import BEACON, CLASS_NAMES, COARSE, DOOR, FINE, GATE, LAKE, OASIS, Scenes


def test_scenes_are_functions_of_seed_and_number() -> None:
    first, again, other = Scenes(9, 48), Scenes(4, 48), Scenes(9, 48, seed=1)
    image, mask = first.read(3)
    assert (again.read(3)[0] == image).all()
    assert (again.read(3)[1] == mask).all()
    assert (other.read(3)[0] != image).any()
    assert (first.read(4)[0] != image).any()


def test_training_never_repeats_a_scene() -> None:
    data = ScenesDataModule(size=32, train_length=4, val_length=4, num_workers=0)
    data.setup("fit")
    train = {
        data.train_dataset[epoch, index]["image"].numpy().tobytes()
        for epoch in range(3)
        for index in range(4)
    }
    val = {data.val_dataset[index]["image"].numpy().tobytes() for index in range(4)}
    assert len(train) == 12
    assert len(val) == 4
    assert not train & val


def test_all_classes_and_ignored_pixels_appear() -> None:
    counts = np.sum(
        [np.bincount(Scenes(50).read(i)[1].ravel(), minlength=256) for i in range(50)], 0
    )
    share = counts / counts.sum()
    assert share[: len(CLASS_NAMES)].min() > 0.01
    assert 0.02 < share[255] < 0.2
    assert counts[len(CLASS_NAMES) : 255].sum() == 0


def mean_colours(classes: tuple[int, int], size: int = 96) -> np.ndarray:
    """Mean colour of each class per scene where it appears, averaged over scenes, (2, 3)."""
    colours: dict[int, list[np.ndarray]] = {label: [] for label in classes}
    for index in range(80):
        image, mask = Scenes(80, size).read(index)
        for label in classes:
            if (mask == label).sum() > 30:
                colours[label].append(image[mask == label].mean(0))
    return np.stack([np.mean(colours[label], 0) for label in classes])


@pytest.mark.parametrize("pair", [(LAKE, OASIS), (GATE, DOOR), (FINE, COARSE)])
def test_twin_classes_have_one_colour(pair: tuple[int, int]) -> None:
    first, second = mean_colours(pair)
    assert abs(first - second).max() < 9  # light alone varies scenes by 25 %


def test_beacon_colour_tells_gates_from_doors() -> None:
    for index in range(40):
        image, mask = Scenes(40).read(index)
        _red, green, blue = image[mask == BEACON].astype(int).mean(0)
        assert not ((mask == GATE).any() and (mask == DOOR).any())
        if (mask == GATE).any():
            assert green > blue
        if (mask == DOOR).any():
            assert blue > green


def test_weaves_differ_in_their_pitch() -> None:
    """The spectrum of a stripe pattern peaks at its pitch: about 2 and 4 pixels."""
    pitches: dict[int, list[float]] = {FINE: [], COARSE: []}
    for index in range(60):
        image, mask = Scenes(60).read(index)
        grey = image.mean(-1)
        for label, found in pitches.items():
            for row in range(0, 84, 6):
                for column in range(0, 84, 6):
                    window = np.s_[row : row + 12, column : column + 12]
                    if (mask[window] == label).all():
                        found.append(peak_period(grey[window]))
    assert len(pitches[FINE]) > 20
    assert len(pitches[COARSE]) > 20
    assert np.median(pitches[FINE]) < 2.9 < 3.2 < np.median(pitches[COARSE])


def peak_period(window: np.ndarray) -> float:
    spectrum = abs(np.fft.rfft2(window - window.mean()))
    row, column = np.unravel_index(spectrum.argmax(), spectrum.shape)
    frequency = np.hypot(np.fft.fftfreq(len(window))[row], column / len(window))
    return float(1 / frequency)


def test_tiny_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="scenes of 16 pixels"):
        Scenes(1, 16)
