"""Detect tracing, export and function modes, to which our own operators would be opaque."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from seglab.torch_internals import function_modes, is_transforming

# torch 2.6 cannot tell compiling from exporting: there, compiled networks run the plain way.
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: True)


def requires_plain_operators(*tensors: Tensor) -> bool:
    """Whether an operator of our own would hide something or would not be understood.

    So it is under a torch-function mode (a default device is none that looks), while a model is
    traced or exported, inside the transforms of `torch.func`, in forward-mode differentiation, and
    for tensors of a subclass (distributed, quantized, fake) or of a device without memory.

    >>> requires_plain_operators(torch.zeros(1))
    False
    >>> requires_plain_operators(torch.zeros(1, device="meta"))
    True
    """
    if any(x.device.type not in ("cpu", "cuda") for x in tensors):
        return True
    if torch.compiler.is_compiling():
        return _is_exporting()
    return (
        any(type(x) not in (Tensor, nn.Parameter) for x in tensors)
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # is public
        or torch.onnx.is_in_onnx_export()
        or is_transforming()
        or any(not isinstance(mode, DeviceContext) for mode in function_modes())
    )
