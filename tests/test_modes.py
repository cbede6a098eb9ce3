"""The matrix of networks and modes that `benchmarks/modes.py` prints."""

from __future__ import annotations

import pytest
from modes import HALF, MODES, Deviation, matrix, networks

EXACT = [name for name, mode in MODES.items() if "float64" in str(mode.dtype)]


DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", list(networks()))
def test_numbers_are_the_same_in_every_mode(network: str, device: str) -> None:
    cells = matrix([network], device)[network]
    if network != "smp Unet":  # the others' convolutions are fused by themselves, or nowhere
        assert "refused" in str(cells.pop("accelerate"))
    found = {name: cell for name, cell in cells.items() if isinstance(cell, Deviation)}
    assert found.keys() == cells.keys(), cells
    for name in found.keys() & set(EXACT):
        assert found[name].loss < 1e-12, name
        assert (found[name].gradients or 0) < 1e-10, (name, found[name].worst)
        assert found[name].labels == 0, name
    for name in ("32-true", *HALF):
        ours, plain = found[name], found[f"{name}, plain"]
        assert ours.gradients is not None
        assert plain.gradients is not None
        assert ours.loss <= 2 * plain.loss + 1e-6, name
        assert ours.gradients <= 1.5 * plain.gradients + 1e-4, (name, ours.worst)
        assert ours.labels <= 1.5 * plain.labels + 1e-3, name
