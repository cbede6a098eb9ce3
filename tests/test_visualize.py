"""Pictures and masks as a viewer or a numpy reader finds them in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seglab.visualize import color_table, grid, overlay, save_mask

PALETTE = [(200, 0, 0), (0, 150, 0), (0, 0, 90)]


@pytest.fixture
def mask() -> np.ndarray:
    return np.array([[0, 1, 2, 255], [2, 2, 0, 255]], np.uint8)


def test_indexed_png_keeps_ids_and_shows_colours(tmp_path: Path, mask: np.ndarray) -> None:
    path = tmp_path / "new" / "folder" / "mask.png"
    save_mask(path, mask, color_table(PALETTE, 3))
    with Image.open(path) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), mask)
        rgb = np.asarray(picture.convert("RGB"))
    assert [tuple(rgb[0, column]) for column in range(4)] == [*PALETTE, (255, 255, 255)]


def test_missing_palette_falls_back_to_distinct_colours() -> None:
    table = color_table(None, 150)
    assert len({tuple(color) for color in table[:150]}) == 150


@pytest.mark.parametrize("wrong", [np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.int64)])
def test_mask_that_is_no_index_image_is_refused(tmp_path: Path, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"mask.png: an indexed PNG holds uint8 \(H, W\)"):
        save_mask(tmp_path / "mask.png", wrong, color_table(PALETTE, 3))


def test_overlay_mixes_colour_and_image_by_opacity(mask: np.ndarray) -> None:
    image = np.full((2, 4, 3), 100, np.uint8)
    colors = color_table(PALETTE, 3)
    np.testing.assert_array_equal(overlay(image, mask, colors, opacity=0.0), image)
    np.testing.assert_array_equal(overlay(image, mask, colors, opacity=1.0), colors[mask])
    assert overlay(image, mask, colors, opacity=0.25)[0, 0].tolist() == [125, 75, 75]


def test_overlay_brings_the_image_to_the_size_of_the_mask(mask: np.ndarray) -> None:
    image = np.full((20, 40, 3), 77, np.uint8)
    assert overlay(image, mask, color_table(PALETTE, 3), 0.0).tolist() == [[[77] * 3] * 4] * 2


def test_grid_shows_image_label_and_prediction_side_by_side(mask: np.ndarray) -> None:
    image, colors = np.full((2, 4, 3), 9, np.uint8), color_table(PALETTE, 3)
    picture = grid([(image, mask, mask[::-1]), (image, mask, mask)], colors, side=4)
    assert picture.shape == (2 + 4 + 2, 4 + 4 + 4 + 4 + 4, 3)
    np.testing.assert_array_equal(picture[:2, :4], image)
    np.testing.assert_array_equal(picture[:2, 8:12], colors[mask])
    np.testing.assert_array_equal(picture[:2, 16:], colors[mask[::-1]])
    np.testing.assert_array_equal(picture[6:, 16:], colors[mask])
    assert (picture[2:6] == 255).all()


def test_grid_takes_samples_of_different_shapes(mask: np.ndarray) -> None:
    tall, image = mask.T.copy(), np.zeros((8, 4, 3), np.uint8)
    colors = color_table(PALETTE, 3)
    picture = grid([(image, mask, mask), (image, tall, tall)], colors, side=8)
    assert picture.shape == (4 + 4 + 8, 8 * 3 + 4 * 2, 3)
