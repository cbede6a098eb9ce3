"""The network contract, by way of a real small encoder."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from seglab.models import Network, Segmenter, SmpNetwork, TimmEncoder
from seglab.models.heads import FCNHead, UPerHead

AUXILIARY = partial(FCNHead, channels=8, in_index=2, num_convs=1, concat_input=False)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(TimmEncoder("resnet18"), partial(UPerHead, channels=8), AUXILIARY, 4)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 67, 45), dtype=torch.uint8)


def test_bytes_and_floats_give_the_same_logits(segmenter: Segmenter, image: torch.Tensor) -> None:
    segmenter.eval()
    assert torch.equal(segmenter(image), segmenter(image.float()))


def test_normalization_is_that_of_imagenet(segmenter: Segmenter, image: torch.Tensor) -> None:
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    by_hand = (image.float().movedim(1, -1) - mean) / std
    torch.testing.assert_close(segmenter.normalize(image), by_hand.movedim(-1, 1))


def test_evaluation_repeats_itself_at_the_size_of_the_image(
    segmenter: Segmenter, image: torch.Tensor
) -> None:
    segmenter.eval()
    first, second = segmenter(image), segmenter(image)
    assert first.shape == (2, 4, 67, 45)
    assert torch.equal(first, second)


def test_auxiliary_logits_come_only_in_training(segmenter: Segmenter, image: torch.Tensor) -> None:
    main, auxiliary = segmenter.train().decode(image)
    assert main.shape == (2, 4, 17, 12)
    assert auxiliary.shape == (2, 4, 5, 3)
    (only,) = segmenter.eval().decode(image)
    assert only.shape == main.shape


def test_state_dict_holds_encoder_and_heads_only(segmenter: Segmenter) -> None:
    prefixes = {key.split(".")[0] for key in segmenter.state_dict()}
    assert prefixes == {"encoder", "decode_head", "auxiliary_head"}


def test_ready_head_brings_its_number_of_classes() -> None:
    encoder = TimmEncoder("resnet18")
    head = FCNHead(encoder.channels, 7, channels=8)
    assert Segmenter(encoder, head).num_classes == 7
    with pytest.raises(ValueError, match="`head` makes 7 logits but num_classes is 5"):
        Segmenter(encoder, head, num_classes=5)


def test_factory_without_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must say how many logits"):
        Segmenter(TimmEncoder("resnet18"), partial(FCNHead, channels=8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 32, 32), r"\(B, 3, H, W\), got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), r"\(B, 3, H, W\), got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), "got torch.int64"),
    ],
)
def test_wrong_images_are_named(segmenter: Segmenter, wrong: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmenter(wrong)


@pytest.mark.parametrize(
    ("arch", "encoder", "options"),
    [
        ("Unet", "resnet18", {"decoder_channels": (32, 16, 16, 8, 8)}),
        ("DeepLabV3Plus", "resnet18", {"decoder_channels": 16, "encoder_output_stride": 8}),
        ("UPerNet", "tu-swin_tiny_patch4_window7_224", {"decoder_channels": 16}),
    ],
)
def test_smp_networks_keep_the_contract(
    arch: str, encoder: str, options: dict[str, object], image: torch.Tensor
) -> None:
    network: nn.Module = SmpNetwork(arch, encoder, num_classes=4, options=options)
    assert isinstance(network, Network)
    network.eval()
    logits = network(image)
    assert logits.shape == (2, 4, 67, 45)
    assert torch.equal(network.decode(image)[0], logits)
    assert torch.equal(network(image.float()), logits)


def test_smp_output_of_another_size_is_refused(image: torch.Tensor) -> None:
    options = {"encoder_depth": 5, "psp_out_channels": 16}
    network = SmpNetwork("PSPNet", "resnet18", 4, options=options).eval()
    with pytest.raises(ValueError, match=r"PSPNet returned.*upsampling"):
        network(image)


@pytest.mark.parametrize(
    ("arch", "encoder"), [("Unnet", "resnet18"), ("Unet", "resnet1"), ("PAN", "tu-twins_svt_small")]
)
def test_unknown_smp_parts_are_named(arch: str, encoder: str) -> None:
    with pytest.raises(ValueError, match=f"smp cannot build {arch} with '{encoder}'"):
        SmpNetwork(arch, encoder, 4)
