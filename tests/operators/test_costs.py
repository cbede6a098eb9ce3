"""Which branches are fused follows the measured costs."""

from __future__ import annotations

import pytest
import torch

from seglab.operators import costs
from seglab.operators.costs import Costs, choose_fused
from seglab.operators.fused_conv import Geometry
from seglab.operators.resampling import ConvAxis, Resampling

GEOMETRY = Geometry((8, 8), ConvAxis(1), ConvAxis(1), Resampling())


def choose(monkeypatch: pytest.MonkeyPatch, split: float, overhead: float) -> tuple[bool, ...]:
    """Resizing costs 1 a pixel and channel, fusing 1 a pixel and channel of the branch."""
    table = Costs(
        plain={"products": 0.0, "resized": 1.0, "weights": 0.0},
        fused={"products": 1.0, "tapped": 0.0, "between": 0, "out": 0, "weights": 0, "steps": 0},
        split=split,
        overhead=overhead,
    )
    monkeypatch.setattr(costs, "find_costs", lambda *_: table)
    # The first two gain 3 * 64 - 3 * 16 = 144 and 5 * (64 - 16) = 240; then one finer, one equal.
    shapes = ((3, 4, 4), (5, 4, 4), (2, 16, 16), (7, 8, 8))
    return choose_fused([torch.zeros(1, *shape) for shape in shapes], 1, GEOMETRY, None)


def test_gains_are_weighed_against_the_split_of_the_rest_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose(monkeypatch, split=0.0, overhead=383.0) == (True, True, False, False)
    assert choose(monkeypatch, split=0.0, overhead=384.0) == (False, False, False, False)
    # 2 + 7 channels are left to the ordinary way, 3 + 5 are not.
    assert choose(monkeypatch, split=42.0, overhead=0.0) == (True, True, False, False)
    assert choose(monkeypatch, split=43.0, overhead=0.0) == (False, False, False, False)
    assert choose(monkeypatch, split=46.0, overhead=-31.0) == (True, True, False, False)
    assert choose(monkeypatch, split=46.0, overhead=-29.0) == (False, False, False, False)
