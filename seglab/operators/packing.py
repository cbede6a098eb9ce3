"""Convolutions whose weights lie in oneDNN's own order, with the activation that follows in them.

Torch reorders the weight of every convolution in every forward pass and writes the result before an
activation reads it again. Packed once, and with the activation done while the result is in
registers, both are saved. The plain weight stays: where it was written to since, and wherever the
packed one does not apply (gradients, another device or dtype, tracing, export), it is used. Writes
through `.data` or NumPy leave no trace in torch; they are told by a sample of the weight, hence
only where they change most of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seglab.operators.observers import requires_plain_operators
from seglab.operators.pairs import find_pairs
from seglab.torch_internals import (
    children_of,
    convolution_of,
    hooks_of,
    is_packing_possible,
    packed_convolution,
    packed_weight,
    version,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "relu": F.relu}


N_SAMPLES = 8
PLAIN_CONVOLUTION = (nn.Conv2d.forward, convolution_of(nn.Conv2d))


class PackedConv2d(nn.Conv2d):
    """A convolution with its weight packed; made by `pack_convolutions_`."""

    activation: str
    packed: tuple[Tensor, tuple[Any, ...]] | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Conv2d's own name
        """Convolve (B, C, H, W), then do what the activation does."""
        if not self._is_usable(input):
            return ACTIVATIONS[self.activation](super().forward(input))
        x = input.contiguous(memory_format=torch.channels_last)
        key = _state_of(self)
        if self.packed is None or self.packed[1] != key:
            self.packed = packed_weight(self, tuple(x.shape)), key
        return packed_convolution(self, x, self.packed[0], self.activation)

    def _is_usable(self, x: Tensor) -> bool:
        return (
            x.device.type == self.weight.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.ndim == 4
            and x.numel() > 0
            and not self.weight.is_inference()  # nothing tells when it is written to
            and not torch.is_autocast_enabled("cpu")
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
            and not torch.compiler.is_compiling()
            and not requires_plain_operators(x, self.weight)
        )

    def extra_repr(self) -> str:
        """As of nn.Conv2d, and the activation."""
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]  # torch's own
        return f"{plain}, activation={self.activation}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}  # copies and pickles pack anew


def _state_of(conv: nn.Conv2d) -> tuple[Any, ...]:
    """What changes when a weight is replaced or written to."""
    weight = conv.weight
    step = max(1, weight.numel() // N_SAMPLES)
    sample = weight.detach().as_strided((weight.numel() // step,), (step,), weight.storage_offset())
    return id(weight), weight.data_ptr(), version(weight), *sample.tolist()


def pack_convolutions_(
    network: nn.Module, example: Tensor, without: Collection[str] = ()
) -> tuple[int, int]:
    """Make the convolutions of a network packed ones, in place.

    Args:
        network: In evaluation mode, float32, on the CPU.
        example: An image to run it with.
        without: Names of modules to leave alone.

    Returns:
        How many convolutions are packed, and how many of them took over a ReLU.
    """
    if not is_packing_possible():
        return 0, 0
    modules = dict(network.named_modules())
    packable = {
        name: module
        for name, module in modules.items()
        if _can_be_packed(module) and name not in without
    }
    gone = _fused_relus(network, example, packable)
    followed = {name for names in gone.values() for name in names}
    for name, module in packable.items():
        module.__class__ = PackedConv2d
        module.packed = None
        module.activation = "relu" if name in followed else "none"
    _replace_by_nothing({modules[name] for name in gone}, network)
    return len(packable), len(gone)


def _fused_relus(
    network: nn.Module, example: Tensor, packable: Collection[str]
) -> dict[str, set[str]]:
    """ReLUs that read nothing but results of packed convolutions, and those convolutions."""
    producers: dict[str, set[str]] = {}
    for pair in find_pairs(network, lambda module: module(example), _is_relu).found:
        producers.setdefault(pair.reader, set()).add(pair.producer)
    return {relu: names for relu, names in producers.items() if names <= set(packable)}


def _is_relu(module: nn.Module) -> str:
    is_plain = type(module).forward is nn.ReLU.forward and "forward" not in vars(module)
    return "" if is_plain and not any(hooks_of(module)) else "-"


def _can_be_packed(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d):
        return False
    kind = type(module)
    return (
        (kind.forward, convolution_of(kind)) == PLAIN_CONVOLUTION
        and "forward" not in vars(module)
        and module.padding_mode == "zeros"
        and (module.padding != "same" or all(side % 2 for side in module.kernel_size))
        and module.weight.dtype == torch.float32
        and not parametrize.is_parametrized(module)
    )


def _replace_by_nothing(gone: Collection[nn.Module], network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in children_of(parent).items():
            if child in gone:
                children_of(parent)[name] = nn.Identity().eval()
