"""The private parts of torch that seglab needs, in one place, each with its reason.

Torch 2.6 to 2.15 have no public way to these. Where one of them changes, a test of
tests/test_torch_internals.py fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules_of_torch
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch

BatchNorm: type[nn.Module] = nn.modules.batchnorm._BatchNorm
"""The base class of batch normalizations of any number of dimensions, synchronized ones too."""

DispatchMode: type[Any] = _python_dispatch.TorchDispatchMode
"""Context that sees every operator of ATen, those within functions that no function mode sees."""

Unwatched: Any = torch._C.DisableTorchFunction
"""Context in which calls reach neither function modes nor subclasses of Tensor."""

UnwatchedBySubclasses: Any = torch._C.DisableTorchFunctionSubclass
"""Context in which calls reach function modes, but no subclass of Tensor."""


def is_transforming() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp) is running, or forward-mode AD."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def function_modes() -> list[TorchFunctionMode]:
    """The torch-function modes that are active, the outermost first."""
    depth = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(index) for index in range(depth)]


def hooks_of_all_modules() -> tuple[Mapping[int, Any], ...]:
    """Forward pre-hooks, forward, backward pre- and backward hooks of every module there is."""
    return (
        modules_of_torch._global_forward_pre_hooks,
        modules_of_torch._global_forward_hooks,
        modules_of_torch._global_backward_pre_hooks,
        modules_of_torch._global_backward_hooks,
    )


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """Forward pre-hooks, forward, backward pre- and backward hooks of one module."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers; writing to the dict sets them, even in inference mode."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own children under every name; writing to the dict replaces them."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters; writing to the dict replaces them."""
    return module._parameters


def is_saved(module: nn.Module, buffer: str) -> bool:
    """Whether a module's own buffer is part of its state dict."""
    return buffer not in module._non_persistent_buffers_set


def convolution_of(kind: type[nn.Conv2d]) -> Any:
    """What a class of convolutions calls with its weight and bias."""
    return kind._conv_forward


def padding_of_axes(conv: nn.Conv2d) -> tuple[int, int]:
    """Zeros added above and to the left, "same" and "valid" spelled out."""
    # The order of this attribute is left, right, top, bottom.
    rows, columns = conv._reversed_padding_repeated_twice[2::-2]
    return rows, columns


def version(x: Tensor) -> int:
    """How often a tensor was written to in place."""
    return x._version


def base_of(x: Tensor) -> Tensor:
    """The tensor that a view looks at; the tensor itself if it is none."""
    return x if x._base is None else x._base


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether something was registered to see a tensor's gradient."""
    return bool(x._backward_hooks)


def tensor_without_memory(
    kind: type[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """An instance of a subclass of Tensor that says what it would be like but holds no values."""
    wrapper: Tensor = Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)
    return wrapper


def writes_in_place(operator: Any) -> bool:
    """Whether an operator of `torch.ops` changes one of its arguments."""
    return bool(operator._schema.is_mutable)


def is_packing_possible() -> bool:
    """Whether this torch brings oneDNN's convolution with weights packed beforehand."""
    return torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_convolution_pointwise"
    )


def packed_weight(conv: nn.Conv2d, shape: tuple[int, ...]) -> Tensor:
    """A convolution's weight in the order in which oneDNN reads it for inputs of a shape."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        conv.weight.detach(), *_arguments_of(conv), list(shape)
    )
    return packed


def packed_convolution(conv: nn.Conv2d, x: Tensor, weight: Tensor, activation: str) -> Tensor:
    """Convolve with a packed weight; `activation` is "none", or what is done to the result."""
    result: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, conv.bias, *_arguments_of(conv), activation, [], ""
    )
    return result


def _arguments_of(conv: nn.Conv2d) -> tuple[list[int], list[int], list[int], int]:
    return list(padding_of_axes(conv)), list(conv.stride), list(conv.dilation), conv.groups
