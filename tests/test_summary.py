"""Costs counted on the meta device against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import FCNHead
from seglab.summary import summarize


def test_multiply_adds_equal_the_count_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    summary = summarize(network, (12, 10))
    assert summary.macs == 12 * 10 * (3 * 8 * 9 + 8 * 5)
    assert summary.parameters == {"0": 3 * 8 * 9 + 8, "2": 8 * 5 + 5, "total": 269}


def test_stored_activations_equal_the_count_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    floats = 12 * 10 * (3 + 8)  # the inputs of both convolutions; ReLU keeps the second's
    assert summarize(network, (12, 10)).activations == 4 * floats


def test_summary_leaves_the_network_as_it_was() -> None:
    encoder = TimmEncoder("test_resnet")
    network = Segmenter(encoder, FCNHead(encoder.channels, num_classes=3, channels=8))
    summary = summarize(network, (64, 64))
    assert not any(p.is_meta for p in network.parameters())
    assert set(summary.parameters) == {"encoder", "decode_head", "total"}
    assert summary.training_memory(2) == 16 * summary.parameters["total"] + 2 * summary.activations


def test_command_prints_costs_and_fusions(
    run: Callable[..., None], tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    run("summary", "--config", tiny, "--data.crop_size", "[64, 96]")
    out = capsys.readouterr().out
    assert "decode_head" in out
    assert "64 x 96" in out
    assert "decode_head.fpn_bottleneck.conv" in out
    assert "8x bilinear" in out
