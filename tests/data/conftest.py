"""Tiny folder data sets, as a user would have them on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WritePair = Callable[..., None]


def _write_pair(
    root: Path, split: str, stem: str, shape: tuple[int, int] = (24, 32), n_values: int = 3
) -> None:
    rng = np.random.default_rng([*stem.encode()])
    for kind, array in (
        ("images", rng.integers(0, 256, (*shape, 3))),
        ("masks", rng.choice([*range(n_values), 255], shape)),
    ):
        folder = root / split / kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(np.uint8)).save(folder / f"{stem}.png")


@pytest.fixture
def write_pair() -> WritePair:
    """Write ``root/split/{images,masks}/stem.png``; mask values 0 .. n_values - 1 and 255."""
    return _write_pair


@pytest.fixture
def folder_root(tmp_path: Path) -> Path:
    """Five training pairs of one size, nine validation pairs of two sizes."""
    for number in range(5):
        _write_pair(tmp_path, "train", f"t{number}")
    for number in range(9):
        _write_pair(tmp_path, "val", f"v{number}", (24, 32) if number % 3 else (32, 24))
    return tmp_path
