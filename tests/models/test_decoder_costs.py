"""The counts behind the decoders' table, against formulas by hand."""

from __future__ import annotations

import pytest
import torch
from decoders import COUNTED, NETWORKS, Costs, count, eseg, verdict
from torch import Tensor, nn

from seglab.models.heads.rsp import RelationalSemanticsExtractor


class Extractors(nn.Module):
    """Three extractors for P2 to P4 of an image."""

    def __init__(self, channels: int, keys: int, window: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            RelationalSemanticsExtractor(channels, keys, window) for _ in range(3)
        )
        self.channels = channels

    def forward(self, image: Tensor) -> None:
        height, width = image.shape[-2:]
        for i, part in enumerate(self.parts, start=2):
            fine, coarse = (
                image.new_zeros(1, self.channels, height >> j, width >> j) for j in (i, i + 1)
            )
            part(fine, coarse)


@pytest.mark.parametrize(
    ("channels", "keys", "window", "rounded"),
    [(128, 64, 3, 5.6), (128, 64, 5, 6.1), (256, 128, 3, 21.7), (256, 128, 5, 22.8)],
)
def test_attention_counts_among_multiply_adds(
    channels: int, keys: int, window: int, rounded: float
) -> None:
    n_fine = sum((COUNTED[0] >> i) * (COUNTED[1] >> i) for i in (2, 3, 4))
    at_fine = channels * keys + channels**2 + window**2 * (keys + channels)
    at_coarse = channels * keys + channels**2
    found = count(Extractors(channels, keys, window)).gmacs
    assert found * 1e9 == n_fine * at_fine + n_fine // 4 * at_coarse
    assert found == pytest.approx(rounded, abs=0.05)


def test_eseg_has_no_atrous_convolution_and_nothing_above_stride_four() -> None:
    found = count(eseg("eseg_lite_s"))
    assert (found.atrous, found.finest_stride) == (0, 4)
    torch.manual_seed(0)
    dilated = count(NETWORKS["PSPNet, R18-D8, 128 channels"]())
    assert dilated.atrous > 0
    assert dilated.finest_stride == 8


def test_verdict_names_what_misses() -> None:
    slow, fast = (Costs(1, 10, 0, 4, speed, 1) for speed in (1.0, 2.0))
    found = {"SegFormer-B0, smp": fast, "eseg_s": slow, "eseg_m": fast._replace(atrous=1)}
    assert "faster than all but SegFormer-B0, smp: **misses**" in verdict("eseg_s", found)
    assert "stride >= 4: **misses**" in verdict("eseg_m", found)
    deep = {"DeepLabV3, R101-D8": Costs(1, 100, 28, 8), "RSP": Costs(1, 26, 0, 4)}
    assert verdict("RSP", deep) == "26.0% of DeepLabV3's GMACs: **misses**"
    assert "holds" in verdict("RSP", deep | {"RSP": Costs(1, 25, 0, 4)})
