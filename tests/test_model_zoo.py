"""The finder against segmentation networks of four libraries, and its page in the docs."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from pathlib import Path

import model_zoo as zoo
import pytest
import torch
import zoo_expectations as expected
from scale_equalization import find_fusions

ROOT = Path(__file__).parents[1]


SPECIMENS = {specimen.name: specimen for specimen in zoo.zoo()}


@pytest.fixture(scope="session")
def findings():
    """What was found, each network examined once."""
    return {}


def examine(name: str, findings: dict):
    if name not in findings:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own, about their own code
            findings[name] = SPECIMENS[name].examine()
    return findings[name]


def test_every_network_has_its_expectation():
    assert set(SPECIMENS) == set(expected.FUSIONS)
    assert set(expected.LEFT) >= {n for n, fusions in expected.FUSIONS.items() if not fusions} - {
        "torchvision fcn resnet50 False",
        "torchvision fcn resnet50 True",
    }


QUICK = [name for name in SPECIMENS if "resnet18" in name or not name.startswith("smp ")]
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPECIMENS]


@pytest.mark.parametrize("name", ALL)
def test_fusions_are_those_of_the_source(name, findings):
    found = {fusion.name: fusion.branches for fusion in examine(name, findings).fusions}
    assert list(found) == list(expected.FUSIONS[name])
    for fusion, branches in expected.FUSIONS[name].items():
        start = 0
        for branch, wanted in zip(found[fusion], branches, strict=True):
            channels, ratio, mode = wanted if isinstance(wanted, tuple) else (wanted, 1.0, None)
            assert (branch.start, branch.stop) == (start, start + channels)
            assert (branch.upsampling, branch.interpolation) == (pytest.approx(ratio), mode)
            start = branch.stop


@pytest.mark.parametrize("name", ALL)
def test_what_is_left_alone_has_the_right_reason(name, findings):
    wanted = expected.LEFT.get(name, {})
    found = defaultdict(list)
    for refusal in examine(name, findings).refusals:
        reason = next((r for r in wanted if re.search(r, refusal.reason)), refusal.reason)
        found[reason].append(refusal.name)
    assert {r: sorted(n) for r, n in found.items()} == {r: sorted(n) for r, n in wanted.items()}


@pytest.mark.slow
def test_the_page_shows_what_is_found(findings):
    page = zoo.page((specimen, examine(name, findings)) for name, specimen in SPECIMENS.items())
    assert (ROOT / "docs" / "model_zoo.md").read_text() == page, (
        "run: python benchmarks/model_zoo.py > docs/model_zoo.md"
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_torchvision_resizes_and_images_are_followed(wrapped):
    from torchvision import tv_tensors
    from torchvision.transforms import functional, v2

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = torch.nn.Conv2d(9, 2, 1)

        def forward(self, x):
            small, size = x[..., ::2, ::2], list(x.shape[2:])
            smooth = functional.resize(small, size, antialias=True)
            return self.fuse(torch.cat([x, smooth, v2.functional.resize(small, size)], 1))

    image = torch.rand(2, 3, 8, 8)
    (fusion,) = find_fusions(Net(), tv_tensors.Image(image) if wrapped else image)
    found = [(b.stop, b.upsampling, b.interpolation) for b in fusion.branches]
    assert found == [(3, 1.0, None), (6, 2.0, "bilinear"), (9, 2.0, "bilinear")]
