"""Parameter counts, key names and shapes of the heads, typed here from MMSegmentation's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from seglab.models.heads import ASPPHead, FCNHead, Head, PSPHead, SepASPPHead, UPerHead

TINY = (96, 192, 384, 768)
BASE = (128, 256, 512, 1024)
SVT_S = (64, 128, 256, 512)
RESNET = (256, 512, 1024, 2048)
AUXILIARY = partial(FCNHead, channels=256, in_index=2, num_convs=1, concat_input=False)


def build(factory: Callable[..., Head], channels: tuple[int, ...], num_classes: int) -> Head:
    with torch.device("meta"):
        return factory(channels, num_classes)


@pytest.mark.parametrize(
    ("factory", "channels", "num_classes", "count"),
    [
        (UPerHead, TINY, 150, 31_497_366),
        (UPerHead, TINY, 21, 31_431_189),
        (UPerHead, TINY, 19, 31_430_163),
        (UPerHead, BASE, 150, 33_315_990),
        (UPerHead, SVT_S, 150, 29_678_742),
        (UPerHead, RESNET, 150, 40_590_486),
        (AUXILIARY, TINY, 150, 923_798),
        (AUXILIARY, BASE, 150, 1_218_710),
        (AUXILIARY, SVT_S, 150, 628_886),
        (AUXILIARY, RESNET, 150, 2_398_358),
        (AUXILIARY, RESNET, 19, 2_364_691),
        (PSPHead, RESNET, 19, 23_083_539),
        (PSPHead, RESNET, 150, 23_150_742),
        (ASPPHead, RESNET, 19, 42_221_075),
        (ASPPHead, RESNET, 150, 42_288_278),
        (SepASPPHead, RESNET, 19, 17_697_923),
        (SepASPPHead, RESNET, 150, 17_765_126),
        (FCNHead, RESNET, 19, 23_605_779),
        (FCNHead, RESNET, 150, 23_672_982),
    ],
)
def test_head_has_the_published_parameter_count(
    factory: Callable[..., Head], channels: tuple[int, ...], num_classes: int, count: int
) -> None:
    head = build(factory, channels, num_classes)
    assert sum(parameter.numel() for parameter in head.parameters()) == count


Shapes = dict[str, tuple[int, ...]]


def blocks(names: Shapes, num_classes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of ConvModules plus the classifier, as MMSegmentation's checkpoints have."""
    for name, shape in names.items():
        yield f"{name}.conv.weight", shape
        yield from ((f"{name}.bn.{key}", shape[:1]) for key in ("weight", "bias"))
        yield from ((f"{name}.bn.running_{key}", shape[:1]) for key in ("mean", "var"))
        yield f"{name}.bn.num_batches_tracked", ()
    yield "conv_seg.weight", (num_classes, next(reversed(names.values()))[0], 1, 1)
    yield "conv_seg.bias", (num_classes,)


def separable(name: str, width: int, out: int) -> Shapes:
    return {
        f"{name}.depthwise_conv": (width, 1, 3, 3),
        f"{name}.pointwise_conv": (out, width, 1, 1),
    }


PYRAMID = {f"psp_modules.{i}.1": (512, 2048, 1, 1) for i in range(4)}
DENSE_BRANCHES = {f"aspp_modules.{i}": (512, 2048, 3, 3) for i in (1, 2, 3)}
CONTEXT = {
    "image_pool.1": (512, 2048, 1, 1),
    "aspp_modules.0": (512, 2048, 1, 1),
    "bottleneck": (512, 2560, 3, 3),
}
STRUCTURES = {
    "uper": (
        UPerHead,
        TINY,
        {f"psp_modules.{i}.1": (512, 768, 1, 1) for i in range(4)}
        | {"bottleneck": (512, 768 + 2048, 3, 3)}
        | {f"lateral_convs.{i}": (512, width, 1, 1) for i, width in enumerate(TINY[:3])}
        | {f"fpn_convs.{i}": (512, 512, 3, 3) for i in range(3)}
        | {"fpn_bottleneck": (512, 2048, 3, 3)},
    ),
    "psp": (PSPHead, RESNET, PYRAMID | {"bottleneck": (512, 4096, 3, 3)}),
    "aspp": (ASPPHead, RESNET, CONTEXT | DENSE_BRANCHES),
    "sep_aspp": (
        SepASPPHead,
        RESNET,
        CONTEXT
        | separable("aspp_modules.1", 2048, 512)
        | separable("aspp_modules.2", 2048, 512)
        | separable("aspp_modules.3", 2048, 512)
        | {"c1_bottleneck": (48, 256, 1, 1)}
        | separable("sep_bottleneck.0", 560, 512)
        | separable("sep_bottleneck.1", 512, 512),
    ),
    "fcn": (
        FCNHead,
        RESNET,
        {"convs.0": (512, 2048, 3, 3), "convs.1": (512, 512, 3, 3), "conv_cat": (512, 2560, 3, 3)},
    ),
    "auxiliary": (AUXILIARY, RESNET, {"convs.0": (256, 1024, 3, 3)}),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_head_has_the_keys_and_shapes_of_mmsegmentation(name: str) -> None:
    factory, channels, names = STRUCTURES[name]
    state = build(factory, channels, 19).state_dict()
    found = {key: tuple(value.shape) for key, value in state.items()}
    assert found == dict(blocks(names, 19))


@pytest.mark.parametrize("factory", [UPerHead, PSPHead, ASPPHead, SepASPPHead, FCNHead])
def test_initialization_is_kaiming_fan_out_and_small_classifier(factory: type[Head]) -> None:
    torch.manual_seed(0)
    head = factory((32, 48, 64, 80), 150, channels=96)
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.conv_seg.bias.any()
    convolutions = [
        (name, module)
        for name, module in head.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.groups == 1 and name != "conv_seg"
    ]
    for name, convolution in convolutions:
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1), name
        assert convolution.bias is None, name
