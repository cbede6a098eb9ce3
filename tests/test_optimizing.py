"""An optimized network computes what the plain one does, or is refused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from seglab import optimizing
from seglab.models import Segmenter, SmpNetwork, TimmEncoder
from seglab.models.heads import PSPHead, UPerHead
from seglab.optimizing import CannotOptimizeError, optimize


def lively(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
    return network


def timm_network(head: type[nn.Module]) -> Segmenter:
    return Segmenter(TimmEncoder("resnet18"), partial(head, channels=8), num_classes=5)


NETWORKS = {
    "UPerNet": lambda: timm_network(UPerHead),
    "PSPNet": lambda: timm_network(PSPHead),
    "smp Unet": lambda: SmpNetwork("Unet", "resnet18", 5),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_optimized_network_gives_equal_logits(name: str) -> None:
    network = lively(NETWORKS[name]()).train()
    twin = copy.deepcopy(network).eval()
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    faster, done = optimize(network, image, repeats=1)
    assert network.training  # as it was
    assert not done.folding.left
    assert done.folding.n_norms == sum(isinstance(m, nn.BatchNorm2d) for m in twin.modules())
    assert "batch normalizations folded" in str(done)
    other = torch.randint(0, 256, (2, 3, 97, 65), dtype=torch.uint8)
    with torch.no_grad():
        for x in (image, other):
            expected = twin(x)
            error = (faster(x) - expected).abs().max() / expected.abs().max()
            assert error < 1e-4


def test_every_candidate_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = optimizing.pack_convolutions_

    def broken(network: nn.Module, *args: object) -> tuple[int, int]:
        counts = honest(network, *args)  # type: ignore[arg-type]
        next(network.parameters()).mul_(1.01)
        return counts

    monkeypatch.setattr(optimizing, "pack_convolutions_", broken)
    monkeypatch.setattr(
        optimizing, "_seconds", lambda networks, *_: [9.0 - i for i in range(len(networks))]
    )
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    _, done = optimize(network, torch.rand(1, 3, 32, 32))
    assert done.n_packed == 0  # the fastest, but it computes something else


def test_network_whose_logits_are_not_finite_is_refused() -> None:
    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

    network = Broken(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(CannotOptimizeError, match="Use it without optimize"):
        optimize(network, torch.rand(1, 3, 32, 32), repeats=1)


def test_layout_of_least_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    for seconds, layout, gain in (
        ([4.0, 2.0, 1.0, 3.0], "channels_last", 4.0),
        ([4.0, 2.0, 1.99, 3.0], "channels_first", 2.0),  # gains too little to be worth it
    ):
        monkeypatch.setattr(optimizing, "_seconds", lambda *_, found=seconds: found)
        faster, done = optimize(network, torch.rand(1, 3, 32, 32))
        assert (done.layout, done.gain) == (layout, gain)
        is_last = faster[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert is_last == (layout == "channels_last")
