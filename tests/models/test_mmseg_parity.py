"""Our networks beside the real MMSegmentation ones: same weights, same input, same numbers.

Skipped unless MMSegmentation can be imported (`benchmarks/mmseg_reference.py` says how):

    python -m pytest -c pyproject.toml tests/models/test_mmseg_parity.py -s -m ""

With `-s` each test prints the largest relative error of what it compared.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import mmseg_reference as reference
import pytest
import torch
from torch import Tensor, nn

from seglab.losses import CrossEntropy
from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import ASPPHead, FCNHead, PSPHead, SepASPPHead, UPerHead
from seglab.models.mmseg import encoder_to_mmseg, from_mmseg, to_mmseg

BACKBONES, scramble = reference.BACKBONES, reference.scramble
pytestmark = [
    pytest.mark.skipif(not reference.is_there(), reason="MMSegmentation is not importable"),
    pytest.mark.filterwarnings("ignore"),
]
K = 5
LARGE = ("swin-s", "swin-b", "svt-b", "svt-l", "convnext-s", "convnext-b")


@pytest.fixture(scope="session")
def build() -> Any:
    """MMSegmentation's registry: a config dictionary to a module."""
    return reference.builder()


def make_encoder(backbone: str) -> TimmEncoder:
    stride = 8 if backbone == "resnet-101" else 32
    return TimmEncoder(BACKBONES[backbone][1], output_stride=stride)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [(64, 64), (225, 301), (512, 683)])
@pytest.mark.parametrize(
    "backbone",
    [pytest.param(b, marks=pytest.mark.slow) if b in LARGE else b for b in BACKBONES],
)
@torch.no_grad()
def test_backbones_give_the_same_features(backbone: str, size: tuple[int, int], build: Any) -> None:
    theirs = build(BACKBONES[backbone][0])
    scramble(theirs)
    theirs.eval()
    ours = make_encoder(backbone).eval()
    network = nn.ModuleDict({"encoder": ours})
    state = {f"backbone.{key}": value for key, value in theirs.state_dict().items()}
    network.load_state_dict(from_mmseg(network, state))
    theirs.load_state_dict(encoder_to_mmseg(ours, ours.state_dict()), strict=True)
    image = torch.randn(1, 3, *size)
    pairs = list(zip(ours(image), theirs(image), strict=True))
    error = max(relative(found, expected) for found, expected in pairs)
    n_own, n_theirs = (sum(p.numel() for p in m.parameters()) for m in (ours, theirs))
    print(f"{backbone} {size}: features {error:.1e}, parameters {n_own:,}")
    assert error < 1e-5
    assert n_own == n_theirs


HEADS = {
    "UPerHead": UPerHead,
    "PSPHead": PSPHead,
    "ASPPHead": ASPPHead,
    "DepthwiseSeparableASPPHead": SepASPPHead,
    "FCNHead": FCNHead,
}
SETUPS = [
    ("swin-t", "UPerHead"),
    ("svt-s", "UPerHead"),
    ("convnext-t", "UPerHead"),
    ("resnet-101", "PSPHead"),
    ("resnet-101", "ASPPHead"),
    ("resnet-101", "DepthwiseSeparableASPPHead"),
    ("resnet-101", "FCNHead"),
]


def make_pair(backbone: str, head: str, build: Any) -> tuple[Segmenter, Any]:
    """Our network and theirs with equal weights, in double precision."""
    encoder = make_encoder(backbone)
    theirs = build(
        reference.network_config(
            backbone,
            reference.head_config(head, encoder.channels, K, channels=32),
            reference.auxiliary_config(encoder.channels, K, channels=16),
        )
    )
    scramble(theirs)
    ours = Segmenter(
        encoder,
        partial(HEADS[head], channels=32, dropout=0.0),
        partial(FCNHead, channels=16, dropout=0.0, in_index=2, num_convs=1, concat_input=False),
        K,
    )
    ours.load_state_dict(ours.translate_state(theirs.state_dict()))
    theirs.load_state_dict(to_mmseg(ours), strict=True)
    return ours.double(), theirs.double()


@pytest.mark.parametrize(("backbone", "head"), SETUPS)
def test_networks_agree_in_logits_loss_and_gradients(backbone: str, head: str, build: Any) -> None:
    ours, theirs = make_pair(backbone, head, build)
    image = torch.randint(0, 256, (2, 3, 65, 90), dtype=torch.uint8)
    normalized = ours.normalize(image)
    target = torch.randint(0, K, (2, 65, 90))
    target[:, :9] = 255
    samples = reference.samples(image, target)["data_samples"]
    ours.eval(), theirs.eval()
    with torch.no_grad():
        metas = [{"ori_shape": (65, 90), "img_shape": (65, 90), "pad_shape": (65, 90)}] * 2
        logits = relative(ours(image), theirs.inference(normalized, metas))
    ours.train(), theirs.train()
    losses = theirs.loss(normalized, samples)
    expected = losses["decode.loss_ce"] + losses["aux.loss_ce"]
    criterion = CrossEntropy()
    main, auxiliary = (
        criterion(nn.functional.interpolate(x, (65, 90), mode="bilinear"), target)
        for x in ours.decode(image)
    )
    loss = main + 0.4 * auxiliary
    expected.backward()
    loss.backward()
    difference = relative(loss.detach(), expected.detach())
    gradients = compare_gradients(ours, theirs)
    print(f"{backbone} {head}: logits {logits:.1e}, loss {difference:.1e}, grads {gradients:.1e}")
    assert max(logits, difference) < 1e-10
    assert gradients < 1e-8


def compare_gradients(ours: Segmenter, theirs: nn.Module) -> float:
    """Largest error of any tensor's gradient, relative to its norm or to 1e-6 of the whole's."""
    own = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    encoder = {k.removeprefix("encoder."): v for k, v in own.items() if k.startswith("encoder.")}
    found = {k: v for k, v in own.items() if not k.startswith("encoder.")}
    renamed = encoder_to_mmseg(ours.encoder, encoder)
    found |= {f"backbone.{key}": value for key, value in renamed.items()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    whole = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
    assert all(gradient is not None for gradient in expected.values())
    return max(
        float((found[key] - gradient).norm() / max(gradient.norm(), 1e-6 * whole))
        for key, gradient in expected.items()
        if gradient is not None
    )
