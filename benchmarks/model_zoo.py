"""What the finder sees in networks it was never adapted to; prints docs/model_zoo.md.

    python benchmarks/model_zoo.py > docs/model_zoo.md
    python benchmarks/model_zoo.py --report "smp UPerNet resnet18" "seglab SepASPPHead resnet10t"

Every network is built from a configuration, with random weights, and run once on a small random
batch. `tests/test_model_zoo.py` compares the findings with lists typed from the models' sources.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from scale_equalization import Fusion, Report, equalize_
from scale_equalization.finding import examine
from scale_equalization.fusion import Findings, Refusal
from torch import nn


@dataclass(frozen=True)
class Specimen:
    """A network of the zoo.

    Attributes:
        library: Where it comes from.
        model: Its name there.
        encoder: Its encoder.
        build: Makes it.
        size: Height and width of the image it is shown.
        options: Remarkable arguments, for the table.
    """

    library: str
    model: str
    encoder: str
    build: Callable[[], nn.Module]
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """E.g. "smp Unet resnet18"."""
        return " ".join((self.library, self.model, self.encoder, *map(str, self.options.values())))

    def examine(self) -> Findings:
        """What the finder says about it."""
        torch.manual_seed(0)
        model, image = self.build(), torch.randn(2, 3, self.size, self.size)
        return examine(model, lambda: model(image))


def zoo() -> list[Specimen]:
    """All networks, in the order of the table."""
    return [*_smp(), *_torchvision(), *_transformers(), *_seglab()]


SWIN = "tu-swin_tiny_patch4_window7_224"
SMP = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus")
SMP += ("PAN", "UPerNet", "Segformer")
# Which architectures an encoder fits; DPT takes vision transformers only.
SMP_ENCODERS = {
    "resnet18": SMP,
    "tu-convnext_atto": SMP,
    "mit_b0": tuple(name for name in SMP if name not in ("UnetPlusPlus", "Linknet")),
    SWIN: tuple(name for name in SMP if name not in ("DeepLabV3", "DeepLabV3Plus", "PAN")),
}


def _smp() -> Iterator[Specimen]:
    for encoder, names in SMP_ENCODERS.items():
        options = {"strict_img_size": False} if encoder == SWIN else {}
        for name in names:
            yield _from_smp(name, encoder, 128 if name == "PAN" else 64, **options)
    yield _from_smp("DPT", "tu-vit_tiny_patch16_224", 224)
    yield _from_smp("DPT", "tu-vit_tiny_patch16_224", 224, decoder_readout="add")
    yield _from_smp("Unet", "resnet18", decoder_attention_type="scse")
    yield _from_smp("FPN", "resnet18", decoder_merge_policy="cat")
    yield _from_smp("Unet", "densenet121")


def _from_smp(model: str, encoder: str, size: int = 64, **options: Any) -> Specimen:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return smp.create_model(model, encoder, encoder_weights=None, classes=3, **options)

    return Specimen("smp", model, encoder, build, size, options)


def _torchvision() -> Iterator[Specimen]:
    for name, encoder in (("fcn", "resnet50"), ("deeplabv3", "resnet50")):
        for aux in (False, True):
            yield _from_torchvision(name, encoder, aux_loss=aux)
    yield _from_torchvision("lraspp", "mobilenet_v3_large")


def _from_torchvision(model: str, encoder: str, **options: Any) -> Specimen:
    def build() -> nn.Module:
        from torchvision.models import get_model

        plain = {"weights": None, "weights_backbone": None, "num_classes": 3}
        network: nn.Module = get_model(f"{model}_{encoder}", **plain, **options)
        return network

    return Specimen("torchvision", model, encoder, build, 64, options)


def _transformers() -> Iterator[Specimen]:
    make = partial(Specimen, "transformers")
    convnext = partial(_upernet, "ConvNextConfig", hidden_sizes=_WIDTHS)
    swin = partial(_upernet, "SwinConfig", embed_dim=8, num_heads=_HEADS)
    concat = {"auxiliary_concat_input": True}
    yield make("UperNet", "ConvNext", convnext, 192)
    yield make("UperNet", "Swin", swin, 192)
    yield make("UperNet", "ConvNext", partial(convnext, head=concat), 192, concat)
    yield make("Segformer", "MiT", _segformer)
    yield make("DPT", "ViT", partial(_dpt, "project"))
    yield make("DPT", "ViT", partial(_dpt, "add"), options={"readout_type": "add"})
    yield make("Beit", "BEiT", _beit, 192)


_WIDTHS, _HEADS, _DEPTHS = [8, 16, 32, 64], [1, 2, 4, 8], [1, 1, 1, 1]
_VIT = {"num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 16}


def _upernet(config: str, head: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    import transformers

    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = getattr(transformers, config)(depths=_DEPTHS, out_features=stages, **options)
    settings = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 32}
    settings |= {"num_labels": 3, **(head or {})}
    return transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, **settings)
    )


def _segformer() -> nn.Module:
    import transformers

    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            depths=_DEPTHS,
            hidden_sizes=_WIDTHS,
            num_attention_heads=_HEADS,
            decoder_hidden_size=16,
            num_labels=3,
        )
    )


def _dpt(readout: str) -> nn.Module:
    import transformers

    return transformers.DPTForSemanticSegmentation(
        transformers.DPTConfig(
            num_hidden_layers=4,
            backbone_out_indices=(0, 1, 2, 3),
            readout_type=readout,
            neck_hidden_sizes=_WIDTHS,
            neck_ignore_stages=(),
            fusion_hidden_size=16,
            num_labels=3,
            image_size=64,
            **_VIT,
        )
    )


def _beit() -> nn.Module:
    import transformers

    return transformers.BeitForSemanticSegmentation(
        transformers.BeitConfig(
            num_hidden_layers=4,
            out_indices=[1, 2, 3, 4],
            auxiliary_channels=8,
            num_labels=3,
            image_size=192,
            **_VIT,
        )
    )


def _seglab() -> Iterator[Specimen]:
    for name in ("UPerHead", "PSPHead", "ASPPHead", "SepASPPHead", "FCNHead"):
        yield Specimen("seglab", name, "resnet10t", partial(_segmenter, name), 192)


def _segmenter(head: str) -> nn.Module:
    from seglab.models import Segmenter, TimmEncoder, heads

    encoder = TimmEncoder("resnet10t", pretrained=False)
    return Segmenter(encoder, getattr(heads, head)(encoder.channels, num_classes=3, channels=16))


HEAD = """# What is found in networks nobody adapted it to

`find_fusions` watches one forward pass; there is no code for any architecture. Each network below
was built from its configuration with random weights and run once on two random images. This page
is printed by

    python benchmarks/model_zoo.py > docs/model_zoo.md

and `tests/test_model_zoo.py` compares it, and the same findings, with lists that were typed from
the sources of the models. A branch is written as its number of channels, and how often and how it
was enlarged on its way to the concatenation: `64 (x2 nearest)`.

What lies between a concatenation and its layer may be anything that passes the scale of each branch
on: resizing, pooling, zero padding, dropout, ReLU, casts, factors that do not depend on the image,
slicing, permuting and shuffling. What is not followed is reported with the name of the module and
the reason: other operations in between; products with a weight written as `@`, einsum, addmm or
`F.bilinear`; LSTMs and `nn.MultiheadAttention`; quantized and TorchScript modules; operations of
other libraries; maps filled slice by slice; sums. Not seen at all: what the images shown do not
run, and what happens inside compiled extensions.
"""


def page(findings: Iterable[tuple[Specimen, Findings]]) -> str:
    """The page for docs/: counts for each library, then every network."""
    findings = list(findings)
    lines = [HEAD, "| library | networks | fusions | left alone |", "|---|---|---|---|"]
    for library in dict.fromkeys(specimen.library for specimen, _ in findings):
        found = [f for specimen, f in findings if specimen.library == library]
        fusions, refusals = (sum(len(part(f)) for f in found) for part in (_fusions, _refusals))
        lines.append(f"| {library} | {len(found)} | {fusions} | {refusals} |")
    for specimen, found in findings:
        lines += ["", *_section(specimen, found)]
    return "\n".join(lines) + "\n"


def _fusions(found: Findings) -> tuple[Fusion, ...]:
    return found.fusions


def _refusals(found: Findings) -> tuple[Refusal, ...]:
    return found.refusals


def _section(specimen: Specimen, found: Findings) -> Iterator[str]:
    options = "".join(f", {key}={value}" for key, value in specimen.options.items())
    yield f"## {specimen.library}: {specimen.model}, {specimen.encoder}{options}"
    yield ""
    if found.fusions:
        yield from ("| fusion | branches |", "|---|---|")
    for fusion in found.fusions:
        yield f"| `{fusion.name}` | {', '.join(map(_branch, fusion.branches))} |"
    if not found.fusions:
        yield "No fusion by concatenation outside the encoder."
    groups: dict[str, list[str]] = {}
    for refusal in found.refusals:
        groups.setdefault(refusal.reason, []).append(f"`{refusal.name}`")
    if groups:
        yield ""
    for reason, names in groups.items():
        yield f"- left alone: {_shortened(names)}: {reason}"


def _shortened(names: list[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{names[0]} ... {names[-1]} ({len(names)} layers)"


def _branch(branch: Any) -> str:
    if branch.interpolation is None:
        return str(branch.width)
    return f"{branch.width} (x{branch.upsampling:g} {branch.interpolation})"


def report(name: str) -> Report:
    """What `equalize_` reports about one network, on four batches of noise."""
    specimen = next(specimen for specimen in zoo() if specimen.name == name)
    torch.manual_seed(0)
    model = specimen.build()
    batches = [torch.randn(4, 3, specimen.size, specimen.size) for _ in range(4)]
    return equalize_(model, batches)


def main() -> None:
    """Print the page, or the reports asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [specimen.name for specimen in zoo()]
    parser.add_argument("--report", nargs="+", metavar="NAME", choices=names, help=str(names))
    asked = parser.parse_args().report
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if asked:
        print("\n\n".join(f"{name}\n{report(name)}" for name in asked))
    else:
        sys.stdout.write(page((specimen, specimen.examine()) for specimen in zoo()))


if __name__ == "__main__":
    main()
