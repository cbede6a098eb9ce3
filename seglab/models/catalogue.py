"""What a config can name: timm's encoders, smp's networks and encoders, our heads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from seglab.models import heads
from seglab.models.encoders import TimmEncoder
from seglab.models.segmenter import Segmenter
from seglab.models.smp import SmpNetwork
from seglab.summary import summarize

ENCODER, HEAD = "encoder", "head"
SMP_NETWORK, SMP_ENCODER = "smp network", "smp encoder"
Size = tuple[int, int]


class Entry(NamedTuple):
    """Something with a name that a config can hold."""

    name: str
    kind: str

    @property
    def yaml(self) -> str:
        """How a config names it."""
        return {
            ENCODER: f"{{class_path: seglab.models.TimmEncoder, init_args: {{name: {self.name}}}}}",
            HEAD: f"{{class_path: seglab.models.heads.{self.name}}}",
            SMP_NETWORK: "{class_path: seglab.models.SmpNetwork, init_args: "
            f"{{arch: {self.name}, encoder: ENCODER}}}}",
            SMP_ENCODER: "{class_path: seglab.models.SmpNetwork, init_args: "
            f"{{arch: ARCH, encoder: {self.name}}}}}",
        }[self.kind]


class Costs(NamedTuple):
    """What an entry costs at one size of image."""

    parameters: int
    macs: int
    channels: tuple[int, ...]  # of an encoder's levels
    strides: tuple[int, ...]


def list_entries() -> list[Entry]:
    """Everything, by kind and name; nothing is built."""
    import segmentation_models_pytorch as smp
    import timm

    kinds = {
        HEAD: [name for name in heads.__all__ if name != "Head"],
        SMP_NETWORK: sorted(_smp_architectures(smp)),
        SMP_ENCODER: sorted(smp.encoders.encoders),
        ENCODER: timm.list_models(),
    }
    return [Entry(name, kind) for kind, names in kinds.items() for name in names]


def _smp_architectures(smp: Any) -> list[str]:
    return [
        name
        for name, member in vars(smp).items()
        if isinstance(member, type)
        and issubclass(member, smp.base.SegmentationModel)
        and member is not smp.base.SegmentationModel
    ]


def find_entries(pattern: str, entries: Sequence[Entry]) -> list[Entry]:
    """Entries of a name, else those that match a pattern, else those whose name holds it.

    Raises:
        ValueError: There are none; says what is near.

    >>> entries = [Entry("resnet18", ENCODER), Entry("resnet50", ENCODER), Entry("Unet", "head")]
    >>> [entry.name for entry in find_entries("resnet*", entries)]
    ['resnet18', 'resnet50']
    >>> find_entries("resnet51", entries)
    Traceback (most recent call last):
    ValueError: nothing is called 'resnet51'; did you mean resnet50, resnet18?
    """
    bare = pattern.partition(".")[0]  # timm's names may end in a tag of weights
    tests = (
        lambda name: name == bare,
        lambda name: fnmatchcase(name.lower(), pattern.lower()),
        lambda name: pattern.lower() in name.lower(),
    )
    for test in tests:
        found = [entry for entry in entries if test(entry.name)]
        if found:
            return found
    folded = {entry.name.lower(): entry.name for entry in entries}
    near = [folded[name] for name in get_close_matches(bare.lower(), folded, n=5)]
    hint = f"did you mean {', '.join(near)}?" if near else "`models` without a name lists kinds"
    raise ValueError(f"nothing is called {pattern!r}; {hint}")


def count_costs(entry: Entry, size: Size, encoder: str, num_classes: int = 19) -> Costs:
    """Build an entry without weights and count; a head on `encoder`, as is smp's network.

    Args:
        entry: What to build.
        size: Height and width of the image.
        encoder: Name of the encoder for heads and for smp's networks.
        num_classes: Of networks.

    Raises:
        ValueError: It cannot be built, or not at this size; says why.
    """
    network = _build(entry, encoder, num_classes)
    try:
        summary = summarize(network, size)
    except (AssertionError, RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(f"{entry.name} cannot run at {size[0]} x {size[1]}: {reason}") from error
    levels: Mapping[str, Any] = vars(network)
    return Costs(
        summary.parameters["total"],
        summary.macs,
        tuple(levels.get("channels", ())),
        tuple(levels.get("strides", ())),
    )


def _build(entry: Entry, encoder: str, num_classes: int) -> nn.Module:
    if entry.kind == SMP_NETWORK:
        return SmpNetwork(entry.name, encoder, num_classes)
    if entry.kind == SMP_ENCODER:
        return SmpNetwork("Unet", entry.name, num_classes)
    if entry.kind == ENCODER:
        return build_encoder(entry.name)
    return Segmenter(build_encoder(encoder), getattr(heads, entry.name), num_classes=num_classes)


def build_encoder(name: str) -> TimmEncoder:
    """Build an encoder without memory where it can be, else as usual."""
    with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        return TimmEncoder(name)
    return TimmEncoder(name)
