"""`torch.ops.seglab.fuse`: the fused convolution as one operator with a gradient.

An operator, and not a chain of tensor operations, so that autograd keeps nothing but its inputs and
`torch.compile` takes it whole. Its first branch may be a map of the fusion's size (`direct`), which
is convolved as it is; the result of the others is added to it in place.

Second derivatives are those of the plain way: the backward pass of a graph that is itself to be
differentiated resizes and concatenates. So does a pass that meets NaN or infinities, which
products with banded matrices would spread to a whole band: the host looks at each result (at one
sum; on CUDA, where fusing has to be forced, it waits for it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from seglab.operators.fused_conv import (
    Geometry,
    add_branch_,
    branch_gradients,
    plain_gradients,
    resize_and_convolve,
)
from seglab.operators.resampling import ConvAxis, Resampling

Shape = Sequence[int]

LONG_ROW = 1 << 16
"""Channels times width from which oneDNN finds weight gradients faster with channels first: twice
as fast, and worth two copies, at 2048 x 64 and by half at 512 x 128 (fitted on one core)."""


def fuse(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    bias: Tensor | None,
    geometry: Geometry,
    direct: bool,
) -> Tensor:
    """Convolve the concatenation of resized branches without making it.

    Args:
        features: branches (B, C_i, h_i, w_i) of one dtype.
        weights: slices (O, C_i, kh, kw) of the weight, one for each branch.
        bias: (O,) or None.
        geometry: size, convolution and resampling.
        direct: whether the first branch has the fusion's size already.

    Returns:
        (B, O, *geometry.out_size), in the memory format of the plain way's result.

    >>> geometry = Geometry((4, 4), ConvAxis(1), ConvAxis(1), Resampling())
    >>> fuse([torch.ones(1, 3, 2, 2)], [torch.ones(5, 3, 1, 1)], None, geometry, False).unique()
    tensor([3.])
    """
    result: Tensor = _fuse(list(features), list(weights), bias, _encode(geometry), direct)
    return result


def _encode(geometry: Geometry) -> list[int]:
    """The geometry as integers, which is what an operator's arguments may be."""
    code = list(geometry.size)
    for axis in (geometry.rows, geometry.columns):
        code += [axis.kernel, axis.stride, axis.padding, axis.dilation]
    resampling = geometry.resampling
    return [*code, int(resampling.mode == "nearest"), int(resampling.align_corners)]


def _decode(code: Sequence[int]) -> Geometry:
    mode = "nearest" if code[10] else "bilinear"
    resampling = Resampling(mode, bool(code[11]))
    return Geometry((code[0], code[1]), ConvAxis(*code[2:6]), ConvAxis(*code[6:10]), resampling)


# Schemas are spelled out: torch 2.6 cannot infer them from `list[Tensor]`.
@torch.library.custom_op(
    "seglab::fuse",
    mutates_args=(),
    schema="(Tensor[] features, Tensor[] weights, Tensor? bias, int[] geometry, bool direct)"
    " -> Tensor",
)
def _fuse(
    features: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    geometry: list[int],
    direct: bool,
) -> Tensor:
    plan = _decode(geometry)
    x = features[0]
    with torch.autocast(x.device.type, enabled=False):
        shape = (len(x), *plan.out_size, len(weights[0]))
        out = x.new_zeros(shape, dtype=_dtype_of_sums(x))
        for feature, weight in list(zip(features, weights, strict=True))[direct:]:
            add_branch_(out, *_operands(feature, weight), plan)
        result = out.permute(0, 3, 1, 2)
        if not _is_finite(out):
            result = resize_and_convolve(features, weights, bias, plan)
        elif direct:  # added last: the sum then needs no further copy for its memory format
            result = plan.convolve(x, weights[0], bias).to(out.dtype).add_(result)
        elif bias is not None:
            result += bias.to(out.dtype).view(-1, 1, 1)
    return result.to(x.dtype).contiguous(memory_format=_memory_format(features, weights))


@_fuse.register_fake
def _(
    features: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    geometry: list[int],
    direct: bool,
) -> Tensor:
    shape = (len(features[0]), len(weights[0]), *_decode(geometry).out_size)
    return torch.empty(
        shape,
        dtype=features[0].dtype,
        device=features[0].device,
        memory_format=_memory_format(features, weights),
    )


@torch.library.custom_op(
    "seglab::fuse_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor[] features, Tensor[] weights, int[] geometry, bool direct,"
    " bool[] needs) -> Tensor[]",
)
def _fuse_backward(
    grad: Tensor,
    features: list[Tensor],
    weights: list[Tensor],
    geometry: list[int],
    direct: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the features, then of the weights; empty tensors for those not needed."""
    plan = _decode(geometry)
    with torch.autocast(grad.device.type, enabled=False):
        sums = _channels_last(grad).permute(0, 2, 3, 1).to(_dtype_of_sums(grad)).contiguous()
        pairs = []
        for index, (x, weight) in enumerate(zip(features, weights, strict=True)):
            wanted = (needs[index], needs[index + len(features)])
            if not any(wanted):
                pair: tuple[Tensor | None, Tensor | None] = (None, None)
            elif direct and index == 0:
                pair = _direct_gradients(grad, x, weight, plan, wanted)
            else:
                pair = branch_gradients(sums, *_operands(x, weight), plan, wanted)
            pairs.append(pair)
    flat = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    if not all(x is None or _is_finite(x) for x in flat):
        flat = plain_gradients(grad, features, weights, plan)
    inputs = [*features, *weights]
    return [
        _like(gradient if need else None, x)
        for gradient, x, need in zip(flat, inputs, needs, strict=True)
    ]


@_fuse_backward.register_fake
def _(
    grad: Tensor,
    features: list[Tensor],
    weights: list[Tensor],
    geometry: list[int],
    direct: bool,
    needs: list[bool],
) -> list[Tensor]:
    return [
        torch.empty_like(x, memory_format=_memory_format([x])) if need else x.new_empty(0)
        for x, need in zip([*features, *weights], needs, strict=True)
    ]


@register_flop_formula(torch.ops.seglab.fuse)
def _count_flops(
    features: Sequence[Shape],
    weights: Sequence[Shape],
    bias: Shape | None,
    geometry: list[int],
    *_: Any,
    **__: Any,
) -> int:
    """Of the plain convolution, as torch counts convolutions however they are computed."""
    n_pixels = len(features) and features[0][0] * math.prod(_decode(geometry).out_size)
    return 2 * n_pixels * sum(math.prod(shape) for shape in weights)


@register_flop_formula(torch.ops.seglab.fuse_backward)
def _count_backward_flops(
    grad: Shape,
    features: Sequence[Shape],
    weights: Sequence[Shape],
    geometry: list[int],
    direct: bool,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    n_pixels = grad[0] * grad[2] * grad[3]
    products = [math.prod(shape) for shape in (*weights, *weights)]
    return 2 * n_pixels * sum(n for n, need in zip(products, needs, strict=True) if need)


def _like(gradient: Tensor | None, x: Tensor) -> Tensor:
    if gradient is None:
        return x.new_empty(0)
    return gradient.to(x.dtype).contiguous(memory_format=_memory_format([x]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, weights, bias, ctx.geometry, ctx.direct = inputs
    ctx.save_for_backward(*features, *weights)
    ctx.bias = bias


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    inputs = ctx.saved_tensors
    n = len(inputs) // 2
    needs = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    if torch.is_grad_enabled():
        gradients = _differentiable_gradients(grad, inputs, needs, _decode(ctx.geometry))
    else:
        found = _fuse_backward(
            grad, list(inputs[:n]), list(inputs[n:]), ctx.geometry, ctx.direct, needs
        )
        gradients = [g if need else None for g, need in zip(found, needs, strict=True)]
    grad_bias = grad.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[2] else None
    return gradients[:n], gradients[n:], grad_bias, None, None


def _differentiable_gradients(
    grad: Tensor, inputs: Sequence[Tensor], needs: Sequence[bool], geometry: Geometry
) -> list[Tensor | None]:
    # Aliases: one branch may have been computed from another, which is not our path to follow.
    aliases = [x.view_as(x) for x in inputs]
    n = len(aliases) // 2
    wanted = [x for x, need in zip(aliases, needs, strict=True) if need]
    if not wanted:  # only the bias is trained
        return [None for _ in needs]
    with torch.autocast(grad.device.type, enabled=False):  # the inputs have been cast
        y = resize_and_convolve(aliases[:n], aliases[n:], None, geometry)
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


_fuse.register_autograd(_backward, setup_context=_setup_context)


def _direct_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, plan: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """In the memory format of the branch, but for weights of long rows."""
    if _memory_format([x]) == torch.contiguous_format:
        return plan.convolve_backward(grad.contiguous(), x, weight, needs)
    grad = _channels_last(grad)
    if x.device.type != "cpu" or x.shape[1] * x.shape[3] < LONG_ROW:
        return plan.convolve_backward(grad, x, weight, needs)
    grad_x, _ = plan.convolve_backward(grad, x, weight, (needs[0], False))
    copies = grad.contiguous(), x.contiguous()
    _, grad_weight = plan.convolve_backward(*copies, weight, (False, needs[1]))
    return grad_x, grad_weight


def _operands(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Branch and weight as they are multiplied.

    On the CPU half precision is multiplied in float32: products rounded one by one would make the
    result less exact than the plain way's.
    """
    if x.device.type == "cpu":
        x, weight = x.to(_dtype_of_sums(x)), weight.to(_dtype_of_sums(x))
    return _channels_last(x), weight


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _is_finite(x: Tensor) -> bool:
    """False too where the sum of finite values overflows: then the plain way is merely slower."""
    return bool(x.sum(dtype=_dtype_of_sums(x)).isfinite())


def _memory_format(features: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Any:
    """The format in which torch's concatenation and convolution would return their result.

    It decides more than speed: dropout draws its mask in the order of memory, so that in another
    format a network would be trained with other masks than the plain way's.
    """
    is_last = all(map(_suggests_channels_last, features)) or any(
        map(_suggests_channels_last, weights)
    )
    return torch.channels_last if is_last else torch.contiguous_format


def _suggests_channels_last(x: Tensor) -> bool:
    """Torch's own rule (`is_channels_last_strides_2d`), which decides maps of one pixel too."""
    shape, stride = x.shape, x.stride()
    if stride[1] == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        if shape[axis] == 0 or stride[axis] < least or (axis == 0 and least == stride[1]):
            return False
        least = stride[axis] * max(shape[axis], 1)
    return True


def _dtype_of_sums(x: Tensor) -> torch.dtype:
    """Half precision is added up in float32, so that the result is rounded once."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
