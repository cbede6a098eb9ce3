"""What a network costs: parameters, multiply-adds and memory at one input size; nothing is run.

Everything happens on the meta device: shapes flow, no numbers. Multiply-adds are half of the
floating-point operations of PyTorch's own counter, which knows convolutions, matrix products and
attention, and counts the plain form of every fusion layer.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seglab.torch_internals import base_of

GIB = 2**30


@dataclass(frozen=True)
class Summary:
    """Costs of one network.

    Attributes:
        parameters: Number of parameters of each child and, as "total", of all.
        macs: Multiply-adds of one forward pass of one image, main output only.
        activations: Bytes that one image keeps for the backward pass in float32.
        size: Height and width of the image.
    """

    parameters: dict[str, int]
    macs: int
    activations: int
    size: tuple[int, int]

    def training_memory(self, batch_size: int) -> int:
        """Bytes for weights, gradients, two moments of Adam, and a batch's activations, float32.

        A lower bound: workspaces and what the allocator keeps come on top.
        """
        return 16 * self.parameters["total"] + batch_size * self.activations

    def __str__(self) -> str:
        lines = [f"{name:<16}{count:>14,} parameters" for name, count in self.parameters.items()]
        height, width = self.size
        lines.append(f"{self.macs / 1e9:.1f} G multiply-adds an image of {height} x {width}")
        lines.append(f"{self.activations / GIB:.2f} GiB of activations an image in float32")
        return "\n".join(lines)


def summarize(network: nn.Module, size: tuple[int, int]) -> Summary:
    """Count parameters, multiply-adds and stored activations.

    Args:
        network: Takes (B, 3, H, W), or as many bands as its `in_channels` says, and returns
            logits; it is copied, not changed.
        size: Height and width of the image.

    >>> summarize(nn.Conv2d(3, 8, 3, padding=1), (10, 20)).macs
    43200
    """
    on_meta = copy.deepcopy(network).to("meta")
    bands = getattr(network, "in_channels", 3)
    image = torch.zeros(1, bands, *size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        on_meta.eval()(image)
    return Summary(
        _parameters(network), counter.get_total_flops() // 2, _stored(on_meta, image), size
    )


def _parameters(network: nn.Module) -> dict[str, int]:
    counts = {
        name: sum(parameter.numel() for parameter in child.parameters())
        for name, child in network.named_children()
    }
    total = sum(parameter.numel() for parameter in network.parameters())
    return {name: count for name, count in counts.items() if count} | {"total": total}


def _stored(on_meta: nn.Module, image: Tensor) -> int:
    """Bytes that autograd keeps per image, without the parameters themselves.

    Two images, because a batch normalization over one pooled value refuses to train.
    """
    known = {id(parameter) for parameter in on_meta.parameters()}
    kept: dict[int, tuple[Any, int]] = {}  # the tensor is held, so that no other takes its id

    def pack(tensor: Tensor) -> Tensor:
        base = base_of(tensor)
        if id(base) not in known:
            kept[id(base)] = (base, base.numel() * base.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        on_meta.train()(torch.cat([image, image]))
    return sum(n_bytes for _, n_bytes in kept.values()) // 2
