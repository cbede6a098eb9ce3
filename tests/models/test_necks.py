"""FPN against torchvision's."""

from __future__ import annotations

import torch
from torchvision.ops import FeaturePyramidNetwork

from seglab.models.necks import FPN

CHANNELS, SIZES = (4, 6, 8), ((17, 23), (9, 12), (5, 6))


def test_pyramid_equals_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = FeaturePyramidNetwork(list(CHANNELS), 8)
    ours = FPN(CHANNELS, 8)
    with torch.no_grad():
        for i in range(len(CHANNELS)):
            for mine, other in (
                (ours.lateral_convs[i], theirs.inner_blocks[i][0]),
                (ours.fpn_convs[i], theirs.layer_blocks[i][0]),
            ):
                mine.weight.copy_(other.weight)
                mine.bias.copy_(other.bias.normal_())
    features = [torch.randn(2, c, *s) for c, s in zip(CHANNELS, SIZES, strict=True)]
    expected = theirs({str(i): x for i, x in enumerate(features)}).values()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    for a, b in zip(ours(features), expected, strict=True):
        torch.testing.assert_close(a, b)
