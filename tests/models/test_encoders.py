"""Encoders of several families at odd sizes, their options, and what a wrong one says."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from seglab.models import TimmEncoder

IMAGE = torch.randn(1, 3, 61, 90, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "channels", "sizes"),
    [
        ("resnet18", (64, 128, 256, 512), [(16, 23), (8, 12), (4, 6), (2, 3)]),
        # Patch embeddings pad at the corner, so sides are rounded up at every level.
        ("swin_tiny_patch4_window7_224", (96, 192, 384, 768), [(16, 23), (8, 12), (4, 6), (2, 3)]),
        ("convnext_atto", (40, 80, 160, 320), [(15, 22), (7, 11), (3, 5), (1, 2)]),
        ("mobilenetv3_small_050", (8, 16, 24, 288), [(16, 23), (8, 12), (4, 6), (2, 3)]),
        # Padded to whole steps of the coarsest level, and cut back.
        ("hrnet_w18_small", (128, 256, 512, 1024), [(16, 23), (8, 12), (4, 6), (2, 3)]),
        ("hardcorenas_a", (24, 40, 112, 960), [(16, 23), (8, 12), (4, 6), (2, 3)]),
    ],
)
def test_families_give_four_levels_at_any_size(
    name: str, channels: tuple[int, ...], sizes: list[tuple[int, int]]
) -> None:
    encoder = TimmEncoder(name).eval()
    with torch.no_grad():
        features = encoder(IMAGE)
    assert encoder.channels == channels
    assert encoder.strides == (4, 8, 16, 32)
    assert [tuple(x.shape[1:]) for x in features] == [
        (width, *size) for width, size in zip(channels, sizes, strict=True)
    ]


@pytest.mark.parametrize("name", ["convnext_atto", "twins_svt_small"])
def test_image_too_small_for_the_family_is_refused(name: str) -> None:
    """MMSegmentation's ConvNeXt and Twins stop there too, with an error of a convolution."""
    encoder = TimmEncoder(name).eval()
    with torch.no_grad():
        assert [x.shape[-1] for x in encoder(torch.zeros(1, 3, 32, 32))] == [8, 4, 2, 1]
        with pytest.raises(
            ValueError, match=r"16 x 90 pixels is too small for timm's .*at least 32 x 32"
        ):
            encoder(torch.zeros(1, 3, 16, 90))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet10t"])
def test_images_of_a_few_pixels_are_padded(name: str) -> None:
    encoder = TimmEncoder(name).eval()
    with torch.no_grad():
        levels = encoder(torch.zeros(1, 3, 3, 5))
    assert all(x.shape[2] == 1 and x.isfinite().all() for x in levels)


@pytest.mark.parametrize(("output_stride", "strides"), [(16, (4, 8, 16, 16)), (8, (4, 8, 8, 8))])
def test_dilation_keeps_resolution(output_stride: int, strides: tuple[int, ...]) -> None:
    encoder = TimmEncoder("resnet18", output_stride=output_stride).eval()
    assert encoder.strides == strides
    sides = [x.shape[-1] for x in encoder(torch.zeros(1, 3, 64, 64))]
    assert sides == [64 // stride for stride in strides]


def test_dilation_is_contracted_in_the_first_block_of_a_stage() -> None:
    encoder = TimmEncoder("resnet50c", output_stride=8)
    first = [encoder.model.layer3[0], encoder.model.layer4[0]]
    later = [encoder.model.layer3[1], encoder.model.layer4[1]]
    assert [block.conv2.dilation for block in first] == [(1, 1), (2, 2)]
    assert [block.conv2.dilation for block in later] == [(2, 2), (4, 4)]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_mmsegmentation_families_end_in_a_norm_per_level(name: str) -> None:
    with torch.no_grad():
        normed = TimmEncoder(name).eval()(IMAGE)
        raw = TimmEncoder(name, norm_outputs=False).eval()(IMAGE)
    for level, x in enumerate(normed):
        vectors = x.permute(0, 2, 3, 1)
        torch.testing.assert_close(
            vectors.mean(-1), torch.zeros(vectors.shape[:-1]), atol=1e-5, rtol=0
        )
        assert (vectors.std(-1, correction=0) - 1).abs().max() < 0.05, level
    assert not hasattr(TimmEncoder("resnet18"), "norm0")
    assert raw[3].shape == normed[3].shape


@pytest.mark.parametrize(
    ("name", "eps"),
    [
        ("swin_tiny_patch4_window7_224", 1e-5),
        ("twins_svt_small", 1e-5),
        ("convnext_atto", 1e-6),
        ("resnet18", 1e-6),
    ],
)
def test_faint_maps_are_normed_with_the_familys_epsilon(name: str, eps: float) -> None:
    """A map of variance v leaves a norm with variance v / (v + epsilon)."""
    encoder = TimmEncoder(name, norm_outputs=True)
    for level, width in enumerate(encoder.channels):
        x = torch.randn(1, width, 3, 3, dtype=torch.float64)
        x = 1e-3 * (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
        variance = encoder.get_submodule(f"norm{level}").double()(x).var(1, correction=0)
        torch.testing.assert_close(variance, torch.full_like(variance, 1e-6 / (1e-6 + eps)))


def test_output_norms_can_be_asked_for() -> None:
    encoder = TimmEncoder("resnet18", norm_outputs=True)
    assert [tuple(getattr(encoder, f"norm{i}").weight.shape) for i in range(4)] == [
        (64,),
        (128,),
        (256,),
        (512,),
    ]


def test_parameters_keep_timm_names() -> None:
    names = {name for name, _ in TimmEncoder("resnet18").named_parameters()}
    assert {"model.conv1.weight", "model.layer1.0.conv1.weight"} <= names


def test_drop_path_rises_linearly() -> None:
    encoder = TimmEncoder("convnext_atto", drop_path=0.3)
    rates = [
        module.drop_prob for module in encoder.modules() if type(module).__name__ == "DropPath"
    ]
    assert rates[-1] == pytest.approx(0.3)
    assert rates == sorted(rates)


def test_no_drop_path_means_none_whatever_the_family_defaults_to() -> None:
    encoder = TimmEncoder("swin_tiny_patch4_window7_224")
    assert "DropPath" not in {type(module).__name__ for module in encoder.modules()}
    with pytest.raises(ValueError, match=r"vgg11 cannot be built with drop_path_rate=0\.2"):
        TimmEncoder("vgg11", drop_path=0.2)


def test_every_parameter_gets_a_gradient() -> None:
    encoder: nn.Module = TimmEncoder("convnext_atto")
    sum(x.square().mean() for x in encoder(IMAGE)).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_third_party_warnings_do_not_leak() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TimmEncoder("swin_tiny_patch4_window7_224")
    assert caught == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "no model 'resnet81'; nearest: resnet"),
        ("swin_tiny", "no model 'swin_tiny'; nearest: .*swin_"),
        ("resnet18.imagenet", "no weights 'imagenet' for resnet18; it has: .*tv_in1k"),
    ],
)
def test_unknown_names_come_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmEncoder(name)


def test_impossible_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"swin_tiny.*output_stride"):
        TimmEncoder("swin_tiny_patch4_window7_224", output_stride=8)
    with pytest.raises(ValueError, match="output_stride must be 8, 16 or 32, got 4"):
        TimmEncoder("resnet18", output_stride=4)
    with pytest.raises(ValueError, match="vgg11 cannot be built with output_stride=8"):
        TimmEncoder("vgg11", output_stride=8)


def test_families_of_one_size_say_so() -> None:
    encoder = TimmEncoder("efficientformer_l1").eval()
    assert encoder(torch.zeros(1, 3, 224, 224))[3].shape == (1, 448, 7, 7)
    with pytest.raises(
        ValueError, match=r"built for images of \(224, 224\).*cannot take \(61, 90\)"
    ):
        encoder(IMAGE)
