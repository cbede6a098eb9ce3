"""What each network of the zoo fuses, by name: typed from the sources of the models.

A branch is its number of channels, or `near`/`bili` of it with the factor by which it is resized
between its last layer and the concatenation. Images are 64 x 64 unless benchmarks/model_zoo.py
says otherwise; encoders have strides 2 (4 for transformers and ConvNeXt) to 32.
"""

from __future__ import annotations

Branch = tuple[int, float, str | None]
Expected = dict[str, dict[str, list[int | Branch]]]


def near(channels: int, ratio: float = 2.0) -> Branch:
    return channels, ratio, "nearest"


def bili(channels: int, ratio: float) -> Branch:
    return channels, ratio, "bilinear"


def unet(coarse, skips):
    """smp unet/decoder.py: interpolate x2 by "nearest", cat([x, skip]), conv1 (conv, norm, ReLU).

    A skip of 0 channels (the missing stride 2 of transformers) leaves no fusion.
    """
    pairs = enumerate(zip(coarse, skips, strict=True))
    return {f"decoder.blocks.{i}.conv1.0": [near(c), s] for i, (c, s) in pairs}


def unet_plus_plus(**blocks):
    """smp unetplusplus/decoder.py: block x_i_j concatenates its coarser input, resized x2, with
    all earlier blocks of its row and the encoder's map, which are concatenated before."""
    return {
        f"decoder.blocks.{name}.conv1.0": [near(coarse), *([width] * times)]
        for name, (coarse, width, times) in blocks.items()
    }


def manet(*widths):
    """smp manet/decoder.py: the resized map is multiplied by attention, hence a map of its own."""
    return {f"decoder.blocks.{i}.conv1.0": [width, width] for i, width in enumerate(widths)}


def pspnet(channels):
    """smp pspnet/decoder.py, depth 3: 1, 2, 3 and 6 bins of an 8 x 8 map, a quarter each."""
    pooled = [bili(channels // 4, 8 / bins) for bins in (1, 2, 3, 6)]
    return {"decoder.conv.0": [*pooled, channels]}


def aspp(name, ratio, channels=256):
    """Four convolved branches and the pooled one, last, from 1 x 1."""
    return {name: [channels] * 4 + [bili(channels, ratio)]}


def deeplab_plus():
    """smp deeplabv3/decoder.py, stride 16; block2 starts depthwise without a norm of its own."""
    return {**aspp("decoder.aspp.0.project.0", 4), "decoder.block2.0.0": [bili(256, 4), 48]}


def upernet(name, deepest, width, size, bottleneck):
    """The pyramid pooling of the deepest level, then all levels at the finest one's size."""
    bins = [width if bins == size else bili(width, size / bins) for bins in (1, 2, 3, 6)]
    return {
        bottleneck: [deepest, *bins],
        name: [width, bili(width, 2), bili(width, 4), bili(width, 8)],
    }


def smp_upernet(deepest):
    """smp upernet/decoder.py; 64 x 64 leaves 2 x 2 at stride 32."""
    return upernet("decoder.fusion_block.0", deepest, 256, 2, "decoder.psp.out_conv.0")


def segformer(name, width, *more):
    """All levels to stride 4, coarsest first."""
    return {name: [bili(width, 8), bili(width, 4), bili(width, 2), width, *more]}


FUSE, SWIN = "decoder.fuse_stage.0", "tu-swin_tiny_patch4_window7_224"
SMP: Expected = {
    "Unet resnet18": unet((512, 256, 128, 64), (256, 128, 64, 64)),
    "Unet tu-convnext_atto": unet((320, 256, 128), (160, 80, 40)),
    "Unet mit_b0": unet((256, 256, 128), (160, 64, 32)),
    f"Unet {SWIN} False": unet((768, 256, 128), (384, 192, 96)),
    "Unet densenet121": unet((1024, 256, 128, 64), (1024, 512, 256, 64)),
    "Unet resnet18 scse": {
        # conv1 reads x * cSE(x) + x * sSE(x); the two gates read the concatenation itself. What the
        # gates give out does not change when they are equalized, so that conv1 sees x times numbers
        f"decoder.blocks.{i}.{layer}": [near(coarse), skip]
        for i, (coarse, skip) in enumerate(((512, 256), (256, 128), (128, 64), (64, 64)))
        for layer in ("attention1.attention.cSE.1", "attention1.attention.sSE.0", "conv1.0")
    },
    "UnetPlusPlus resnet18": unet_plus_plus(
        x_0_0=(512, 256, 1),
        x_1_1=(256, 128, 1),
        x_2_2=(128, 64, 1),
        x_3_3=(64, 64, 1),
        x_0_1=(256, 128, 2),
        x_1_2=(128, 64, 2),
        x_2_3=(64, 64, 2),
        x_0_2=(128, 64, 3),
        x_1_3=(64, 64, 3),
        x_0_3=(64, 64, 4),
    ),
    "UnetPlusPlus tu-convnext_atto": unet_plus_plus(
        x_0_0=(320, 160, 1),
        x_1_1=(160, 80, 1),
        x_2_2=(80, 40, 1),
        x_0_1=(256, 80, 2),
        x_1_2=(80, 40, 2),
        x_0_2=(128, 40, 3),
    ),
    f"UnetPlusPlus {SWIN} False": unet_plus_plus(
        x_0_0=(768, 384, 1),
        x_1_1=(384, 192, 1),
        x_2_2=(192, 96, 1),
        x_0_1=(256, 192, 2),
        x_1_2=(192, 96, 2),
        x_0_2=(128, 96, 3),
    ),
    "MAnet resnet18": manet(256, 128, 64, 64),
    "MAnet tu-convnext_atto": manet(160, 80, 40),
    "MAnet mit_b0": manet(160, 64, 32),
    f"MAnet {SWIN} False": manet(384, 192, 96),
    "Linknet resnet18": {},
    "Linknet tu-convnext_atto": {},
    f"Linknet {SWIN} False": {},
    "FPN resnet18": {},
    "FPN tu-convnext_atto": {},
    "FPN mit_b0": {},
    f"FPN {SWIN} False": {},
    # the last resizing of three, two and one, each behind a convolution; read by the logits
    "FPN resnet18 cat": {"segmentation_head.0": [bili(128, 2)] * 3 + [128]},
    "PSPNet resnet18": pspnet(128),
    "PSPNet tu-convnext_atto": pspnet(80),
    "PSPNet mit_b0": pspnet(64),
    f"PSPNet {SWIN} False": pspnet(192),
    "DeepLabV3 resnet18": aspp("decoder.aspp.project.0", 8),
    "DeepLabV3 tu-convnext_atto": aspp("decoder.aspp.project.0", 8),
    "DeepLabV3 mit_b0": aspp("decoder.aspp.project.0", 8),
    "DeepLabV3Plus resnet18": deeplab_plus(),
    "DeepLabV3Plus tu-convnext_atto": deeplab_plus(),
    "DeepLabV3Plus mit_b0": deeplab_plus(),
    "PAN resnet18": {},
    "PAN tu-convnext_atto": {},
    "PAN mit_b0": {},
    "UPerNet resnet18": smp_upernet(512),
    "UPerNet tu-convnext_atto": smp_upernet(320),
    "UPerNet mit_b0": smp_upernet(256),
    f"UPerNet {SWIN} False": smp_upernet(768),
    "Segformer resnet18": segformer(FUSE, 256, bili(256, 0.5)),  # stride 2 is shrunk
    "Segformer tu-convnext_atto": segformer(FUSE, 256),
    "Segformer mit_b0": segformer(FUSE, 256),
    f"Segformer {SWIN} False": segformer(FUSE, 256),
    # ReadoutConcatBlock: cat([features, prefix token], dim=2), then a linear layer
    "DPT tu-vit_tiny_patch16_224": {
        f"decoder.projection_blocks.{i}.project.0": [192, 192] for i in range(4)
    },
    "DPT tu-vit_tiny_patch16_224 add": {},
}

# transformers upernet/modeling_upernet.py and beit/modeling_beit.py; 192 x 192 leaves 6 x 6
HEAD = ("decode_head.fpn_bottleneck", "decode_head.bottleneck")
UPER = upernet(f"{HEAD[0]}.conv", 64, 16, 6, f"{HEAD[1]}.conv")
OTHERS: Expected = {
    "torchvision fcn resnet50 False": {},
    "torchvision fcn resnet50 True": {},
    "torchvision deeplabv3 resnet50 False": aspp("classifier.0.project.0", 8),
    "torchvision deeplabv3 resnet50 True": aspp("classifier.0.project.0", 8),
    "torchvision lraspp mobilenet_v3_large": {},
    "transformers UperNet ConvNext": UPER,
    "transformers UperNet Swin": UPER,
    "transformers UperNet ConvNext True": {**UPER, "auxiliary_head.conv_cat.conv": [32, 8]},
    "transformers Segformer MiT": segformer("decode_head.linear_fuse", 16),
    "transformers DPT ViT": {
        f"neck.reassemble_stage.readout_projects.{i}.0": [16, 16] for i in range(4)
    },
    "transformers DPT ViT add": {},
    "transformers Beit BEiT": upernet(
        f"{HEAD[0]}.convolution", 16, 16, 6, "decode_head.psp_bottleneck.convolution"
    ),
    "seglab UPerHead resnet10t": upernet(f"{HEAD[0]}.conv", 512, 16, 6, f"{HEAD[1]}.conv"),
    "seglab PSPHead resnet10t": {
        f"{HEAD[1]}.conv": [512, bili(16, 6), bili(16, 3), bili(16, 2), 16]
    },
    "seglab ASPPHead resnet10t": {f"{HEAD[1]}.conv": [bili(16, 6), 16, 16, 16, 16]},
    "seglab SepASPPHead resnet10t": {f"{HEAD[1]}.conv": [bili(16, 6), 16, 16, 16, 16]},
    "seglab FCNHead resnet10t": {"decode_head.conv_cat.conv": [512, 16]},
}
FUSIONS: Expected = {**{f"smp {name}": fusions for name, fusions in SMP.items()}, **OTHERS}

# -- left alone ------------------------------------------------------------------------------

SUM = "fused by a sum"
EXCLUDED, DEPTHWISE = "excluded by the include and exclude patterns", "depthwise, followed by its"


def blocks(*numbers, of="decoder.blocks"):
    return [f"{of}.{number}" for number in numbers]


PYRAMID = blocks("p4", "p3", "p2", of="decoder")  # FPNBlock: x + skip
ATTENTION = blocks("fpa", "gau3", "gau2", "gau1", of="decoder")  # FPABlock and GAUBlock: y_up + z
LATERAL = blocks(0, 1, 2, of="decoder.fpn_lateral_blocks")
SUMS = {
    "smp Linknet resnet18": blocks(0, 1, 2, 3),
    "smp Linknet tu-convnext_atto": blocks(0, 1, 2),  # no map of stride 2
    f"smp Linknet {SWIN} False": blocks(0, 1, 2),
    "smp FPN resnet18 cat": PYRAMID,
    "smp DPT tu-vit_tiny_patch16_224": blocks(1, 2, 3, of="decoder.fusion_blocks"),
    "smp DPT tu-vit_tiny_patch16_224 add": blocks(1, 2, 3, of="decoder.fusion_blocks"),
    "torchvision lraspp mobilenet_v3_large": ["classifier"],
    "transformers UperNet ConvNext": ["decode_head"],
    "transformers UperNet Swin": ["decode_head"],
    "transformers UperNet ConvNext True": ["decode_head"],
    "transformers DPT ViT": blocks(1, 2, 3, of="neck.fusion_stage.layers"),
    "transformers DPT ViT add": blocks(1, 2, 3, of="neck.fusion_stage.layers"),
    "transformers Beit BEiT": ["decode_head"],
    "seglab UPerHead resnet10t": ["decode_head"],
}
for _encoder in ("resnet18", "tu-convnext_atto", "mit_b0", f"{SWIN} False"):
    SUMS[f"smp FPN {_encoder}"] = [*PYRAMID, "decoder.merge"]  # torch.stack(x).sum(dim=0)
    SUMS[f"smp UPerNet {_encoder}"] = LATERAL
    SUMS[f"smp PAN {_encoder}"] = ATTENTION
LEFT: dict[str, dict[str, list[str]]] = {name: {SUM: modules} for name, modules in SUMS.items()}
LEFT["seglab SepASPPHead resnet10t"] = {
    DEPTHWISE: ["decode_head.sep_bottleneck.0.depthwise_conv.conv"]
}
# Swin's patch merging: cat, norm, linear
LEFT["transformers UperNet Swin"][EXCLUDED] = [
    f"backbone.swin.encoder.layers.{i}.downsample.reduction" for i in range(3)
]
# Every dense layer but the first of a block reads a concatenation; so do the transitions
LEFT["smp Unet densenet121"] = {
    EXCLUDED: [
        f"encoder.features.denseblock{block}.denselayer{layer}.conv1"
        for block, layers in ((1, 6), (2, 12), (3, 24), (4, 16))
        for layer in range(2, layers + 1)
    ]
    + [f"encoder.features.transition{i}.conv" for i in (1, 2, 3)]
}
# Patches plus class token: tokens joined by a concatenation are added up before the projection.
LEFT["transformers DPT ViT add"]["its input is not a branch times a factor"] = [
    f"neck.reassemble_stage.layers.{i}.projection" for i in range(4)
]
