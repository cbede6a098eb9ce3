"""LazyResizing: resizing and concatenating become lazy, convolutions of lazy maps are fused.

Within the mode, `F.interpolate` and `torch.cat` return a `LazyTensor` and a convolution that reads
one multiplies the branches at their own resolution (`fused_conv.py`) where that is faster. Anything
else gets the map (`lazy_tensor.py`). Calls with arguments that torch would refuse, or of kinds that
are not handled here, go to torch as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from seglab.operators.branches import convolve_branches
from seglab.operators.fused_conv import Geometry
from seglab.operators.lazy_tensor import Branch, LazyTensor, Recipe
from seglab.operators.nested import replace_tensors
from seglab.operators.observers import requires_plain_operators
from seglab.operators.resampling import ConvAxis, Resampling

Function = Callable[..., Any]
WRITING = frozenset(
    {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__set__"}
)


class LazyResizing(TorchFunctionMode):
    """Makes resizing and concatenating lazy, and fuses convolutions of what is lazy.

    Args:
        force: "fused" to fuse wherever possible, or None to go by measured costs.
        eager: numbers of the resizing calls (0 is the first in this mode) that are not made lazy.

    Attributes:
        fused: weights of the convolutions that were fused, and how many of their branches.
    """

    def __init__(self, force: str | None = None, eager: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.force = force
        self.eager = eager
        self.fused: list[tuple[Tensor, int]] = []
        self._n_calls = 0
        self._recipes: weakref.WeakSet[Recipe] = weakref.WeakSet()

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Intercept interpolate, cat, conv2d, inactive dropout and what works in place."""
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        result = handler(self, *args, **kwargs) if handler else None
        if result is not None:
            return result
        if _may_write(func, args, kwargs):
            self._compute_before_writing([*args, *kwargs.values()])
        return func(*args, **kwargs)

    def next_call(self) -> int:
        """Number of a resizing call."""
        self._n_calls += 1
        return self._n_calls - 1

    def lazy(
        self, branches: Sequence[Branch], size: tuple[int, int], calls: frozenset[int]
    ) -> LazyTensor:
        """A LazyTensor that is computed before one of its branches is written to."""
        recipe = Recipe.of(branches, size, calls)
        self._recipes.add(recipe)
        return LazyTensor.of(recipe)

    def _compute_before_writing(self, values: list[Any]) -> None:
        written = _storages(values)
        for recipe in list(self._recipes):
            if recipe.value is None and any(_storage(x) in written for x, _ in recipe.branches):
                recipe.materialize()


def _storages(values: list[Any]) -> set[int]:
    """Where the memory of tensors begins, of lazy ones that of their maps."""
    found: set[int] = set()

    def collect(x: Tensor) -> Tensor:
        held = x.recipe.value if isinstance(x, LazyTensor) else x
        if held is not None and held.layout is torch.strided and held.device.type != "meta":
            found.add(_storage(held))
        return x

    replace_tensors(values, collect, in_place=False)
    return found


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _may_write(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may change a tensor in place; wrongly yes costs time, wrongly no an error."""
    name = getattr(func, "__name__", "")
    if name in WRITING or name.rstrip("_") + "_" == name or "out" in kwargs:
        return True
    code = getattr(func, "__code__", None)  # of functions like F.relu(x, inplace)
    return code is not None and "inplace" in code.co_varnames and _has_true(args, kwargs)


def _has_true(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(value is True for value in (*args, kwargs.get("inplace")))


def _interpolate(
    mode_: LazyResizing,
    input: Tensor,  # noqa: A002  # interpolate's own name
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    call = mode_.next_call()
    if call in mode_.eager or antialias or recompute_scale_factor or not _is_map(input):
        return None
    if mode not in ("nearest", "bilinear") or (mode == "nearest" and align_corners is not None):
        return None
    x = input.materialize() if isinstance(input, LazyTensor) else input
    whole = _whole_size(x, size, scale_factor)
    if whole is None or whole == tuple(x.shape[2:]) or requires_plain_operators(x):
        return None
    how = Resampling(mode, bool(align_corners))
    return mode_.lazy([Branch(x, how)], whole, frozenset({call}))


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point() and x.numel() > 0


def _whole_size(x: Tensor, size: Any, scale_factor: Any) -> tuple[int, int] | None:
    """The size asked for; None unless it says where each pixel is taken from."""
    if (size is None) == (scale_factor is None):
        return None
    given = size if scale_factor is None else scale_factor
    pair = tuple(given) if isinstance(given, tuple | list) else (given, given)
    if len(pair) != 2:
        return None
    if scale_factor is not None:
        if not all(_is_exact(float(factor)) for factor in pair):
            return None
        pair = tuple(side * float(factor) for side, factor in zip(x.shape[2:], pair, strict=True))
    if any(side != int(side) or side < 1 for side in pair):
        return None
    return int(pair[0]), int(pair[1])


def _is_exact(factor: float) -> bool:
    """Whether positions follow from the sizes: interpolate goes by the factor it is given."""
    return factor > 0 and (factor.is_integer() or (1 / factor).is_integer())


def _cat(mode_: LazyResizing, tensors: Sequence[Tensor], dim: int = 0, **others: Any) -> Any:
    if others or dim not in (1, -3) or not isinstance(tensors, tuple | list):
        return None
    if not any(map(_is_pending, tensors)) or not all(map(_is_map, tensors)):
        return None
    alike = {(len(x), *x.shape[2:], x.dtype, x.device) for x in tensors}
    if len(alike) > 1 or requires_plain_operators(*_ordinary(tensors)):
        return None
    branches: list[Branch] = []
    for x in tensors:
        if _is_pending(x):
            x.recipe.check()
            x.recipe.is_fused = True
            branches += x.recipe.branches
        else:
            branches.append(Branch(x.materialize() if isinstance(x, LazyTensor) else x, None))
    calls = frozenset().union(*(x.recipe.calls for x in tensors if isinstance(x, LazyTensor)))
    return mode_.lazy(branches, (tensors[0].shape[2], tensors[0].shape[3]), calls)


def _is_pending(x: Any) -> TypeGuard[LazyTensor]:
    """Whether a map is lazy and was not computed so far."""
    if not isinstance(x, LazyTensor) or x.recipe.value is not None:
        return False
    return x.recipe.inference == torch.is_inference_mode_enabled()


def _ordinary(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if not isinstance(x, LazyTensor)]


def _conv2d(
    mode_: LazyResizing,
    input: Tensor,  # noqa: A002  # conv2d's own name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not _is_pending(input) or groups != 1 or isinstance(padding, str):
        return None
    if input.shape[1] != weight.shape[1] or requires_plain_operators(weight):
        return None
    recipe = input.recipe
    recipe.check()
    how = next(branch.resampling for branch in recipe.branches if branch.resampling)
    axes = zip(weight.shape[2:], *map(_pair, (stride, padding, dilation)), strict=True)
    rows, columns = (ConvAxis(*axis) for axis in axes)
    geometry = Geometry(recipe.size, rows, columns, how)
    if min(geometry.out_size) < 1:
        return None
    maps = [x if other in (None, how) else other(x, recipe.size) for x, other in recipe.branches]
    result = convolve_branches(maps, weight, bias, geometry, mode_.force)
    if result is None:
        return None
    recipe.is_fused = True
    mode_.fused.append((weight, sum(result[1])))
    return result[0]


def _dropout(
    mode_: LazyResizing,
    input: Tensor,  # noqa: A002  # dropout's own name
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Any:
    return None if training else input


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


HANDLERS: dict[Function, Function] = {
    F.interpolate: _interpolate,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.concatenate: _cat,
    F.conv2d: _conv2d,
    F.dropout: _dropout,
    F.dropout2d: _dropout,
}
