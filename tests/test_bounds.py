"""Bounds and words that are told before torch is loaded are those that the classes refuse by."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from seglab.bounds import BOUNDS, Bound, check_bounds, find_fault


def build(place: str, value: object) -> None:
    """Make what takes the value at a place, and nothing else."""
    section, _, key = place.rpartition(".")
    if section == "trainer":
        Trainer(**{key: value}, logger=False, accelerator="cpu", enable_progress_bar=False)
    elif section == "scale_equalization":
        from scale_equalization import ScaleEqualizationCallback

        ScaleEqualizationCallback(**{key: value})
    elif section == "predictions":
        from seglab.reporting.predictions import PredictionWriter

        PredictionWriter(**{key: value})
    elif section == "model":
        import torch

        from seglab.models import Segmenter, TimmEncoder
        from seglab.models.heads import FCNHead
        from seglab.task import SegmentationTask

        with torch.device("meta"):
            encoder = TimmEncoder("test_resnet")
            network = Segmenter(encoder, FCNHead(encoder.channels, 2, channels=8, in_index=1))
        SegmentationTask(network, 2, **{key: value})
    elif section == "data":
        from seglab.data import FolderDataModule, ScenesDataModule

        more = {"folds": 2} if key == "fold" else {}
        if key in ("val_fraction", "folds", "fold"):
            FolderDataModule("none", ["a", "b"], **{key: value}, **more)
        else:
            pair = key in ("crop_size", "scale", "eval_scale")
            ScenesDataModule(**{key: (value, 64) if pair else value})
    else:
        seed_everything(value)


@pytest.mark.parametrize("place", BOUNDS)
def test_bounds_are_those_of_the_classes(place: str) -> None:
    bound = BOUNDS[place]
    outside = [bound.least - 1] + ([bound.least] if bound.is_open else [])
    outside += [bound.most + 1] if bound.most != float("inf") else []
    for value in outside:
        with pytest.raises(Exception, match=r".") as caught:
            build(place, int(value))
        assert type(caught.value).__name__ in ("ValueError", "MisconfigurationException")
    build(place, 0.5 if bound.is_open else int(bound.least))


def test_values_at_the_ends_are_judged() -> None:
    assert Bound(0, 1).holds(0)
    assert Bound(0, 1).holds(1)
    assert not Bound(0, 1, is_open=True).holds(0)
    assert not Bound(0).holds(float("nan"))
    assert (
        find_fault("data.crop_size", (64, 0)) == "data.crop_size is [64, 0]; it must be at least 1"
    )
    assert find_fault("data.batch_size", True) == find_fault("data.unknown", -1) == ""
    check_bounds(data__limit="names.txt", data__crop_size=None)


def test_words_that_lightning_knows_are_let_through() -> None:
    from seglab.cli.arguments import ConfigError, Given
    from seglab.cli.values import check_value

    known = {
        "trainer.accelerator": [*AcceleratorRegistry.available_accelerators(), "auto", "gpu"],
        "trainer.strategy": [*StrategyRegistry.available_strategies(), "auto"],
    }
    for place, words in known.items():
        for word in words:
            check_value(Given({}, {}, []), word, place)
        with pytest.raises(ConfigError, match="there is no"):
            check_value(Given({}, {}, []), words[0] + "x", place)
