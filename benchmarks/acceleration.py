"""`seglab.accelerate` on networks of segmentation_models_pytorch, torchvision and transformers.

    python benchmarks/acceleration.py [--crop 320] [--batch 2] [--threads 2] [--repeats 5]

Forward and backward pass in training, as it is and accelerated, each on a copy, in turn. What
`accelerate` refuses because nothing is gained is listed with its reason. Needs transformers, which
is among the development dependencies; random weights. Nothing else may run.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from side_by_side import HEADER, peak_bytes, rows, time_in_turn
from torch import Tensor, nn

import seglab
from seglab.operators.acceleration import CannotAccelerateError


def smp(name: str, encoder: str) -> nn.Module:
    """A network of segmentation_models_pytorch."""
    import segmentation_models_pytorch

    model: nn.Module = segmentation_models_pytorch.create_model(
        name, encoder, encoder_weights=None, classes=21
    )
    return model


def torchvision(name: str) -> nn.Module:
    """A network of torchvision."""
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None, weights_backbone=None, num_classes=21)
    return model


def upernet(backbone: str, n_classes: int) -> nn.Module:
    """UPerNet of transformers on "swin-t" or "convnext-t", with the recipes' widths."""
    import transformers as hf

    backbones = {
        "swin-t": partial(hf.SwinConfig, embed_dim=96, depths=[2, 2, 6, 2]),
        "convnext-t": partial(hf.ConvNextConfig, depths=[3, 3, 9, 3]),
    }
    stages = ["stage1", "stage2", "stage3", "stage4"]
    config = hf.UperNetConfig(
        backbone_config=backbones[backbone](out_features=stages),
        hidden_size=512,
        num_labels=n_classes,
        auxiliary_in_channels=384,
    )
    return hf.UperNetForSemanticSegmentation(config)


def segformer(n_classes: int = 21) -> nn.Module:
    """SegFormer-B0 of transformers."""
    import transformers as hf

    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(num_labels=n_classes))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "smp UPerNet, ResNet-50": partial(smp, "UPerNet", "resnet50"),
    "smp PSPNet, ResNet-50": partial(smp, "PSPNet", "resnet50"),
    "smp DeepLabV3+, ResNet-50": partial(smp, "DeepLabV3Plus", "resnet50"),
    "smp Unet, ResNet-34": partial(smp, "Unet", "resnet34"),
    "smp UnetPlusPlus, ResNet-34": partial(smp, "UnetPlusPlus", "resnet34"),
    "smp Segformer, MiT-B0": partial(smp, "Segformer", "mit_b0"),
    "torchvision DeepLabV3, ResNet-50": partial(torchvision, "deeplabv3_resnet50"),
    "transformers UPerNet, Swin-T": partial(upernet, "swin-t", 21),
    "transformers SegFormer-B0": segformer,
}


def train(model: nn.Module, image: Tensor) -> None:
    """Forward and backward pass."""
    found: Any = model(image)
    outputs = found.values() if isinstance(found, dict) else [found]
    total = torch.stack([x.float().square().mean() for x in outputs]).sum()
    model.zero_grad()
    total.backward()


def compare(name: str, image: Tensor, repeats: int, device: str) -> str:
    """Two rows, or one that says why not."""
    torch.manual_seed(0)
    model = NETWORKS[name]().to(device).train()
    faster = copy.deepcopy(model)
    try:
        done = seglab.accelerate(faster, image, repeats=2)
    except CannotAccelerateError as refusal:
        return f"| {name} | refused: {str(refusal).splitlines()[0]} | | | | |"
    passes = {
        "as it is": partial(train, model, image),
        "accelerated": partial(train, faster, image),
    }
    times = time_in_turn(passes, repeats)
    model.zero_grad(), faster.zero_grad()  # gradients are part of what a pass allocates
    peaks = {way: peak_bytes(p, device=device) for way, p in passes.items()}
    return rows(f"{name} (differs by {done.error:.0e})", times, peaks)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--crop", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {vars(options)}")
    print(HEADER.format("network", "ms", "peak MB"))
    image = torch.randn(options.batch, 3, options.crop, options.crop).to(options.device)
    for name in options.networks:
        print(compare(name, image, options.repeats, options.device), flush=True)


if __name__ == "__main__":
    main()
