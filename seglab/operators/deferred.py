"""Resized and concatenated maps that are not made until something needs them.

Within `Deferring`, `F.interpolate` and `torch.cat` return a `Deferred` tensor: a promise, with the
right shape, that remembers its branches. A convolution that meets one multiplies the branches at
their own resolution (`fused_conv.py`); anything else makes the promised tensor first, by the
very call that was deferred. So whatever a network does with its maps, the numbers stay the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from seglab.operators.branches import convolve_branches
from seglab.operators.fused_conv import Geometry
from seglab.operators.resampling import Resampling, Window

Function = Callable[..., Any]
LOOKS = frozenset({"shape", "dtype", "device", "ndim", "layout", "is_cuda", "names", "is_sparse"})
"""Attributes that can be answered without the tensor."""

WRITING = frozenset(
    {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__set__"}
)


class Branch(NamedTuple):
    """A map, and how it is to be resized (None: not at all)."""

    x: Tensor
    resampling: Resampling | None


class Deferred(Tensor):
    """A promised tensor (B, C, H, W): branches, resized to H x W and concatenated.

    Attributes:
        branches: the maps it consists of.
        versions: of the branches when the promise was made.
    """

    branches: tuple[Branch, ...]
    versions: tuple[int, ...]
    _made: Tensor | None

    @staticmethod
    def of(branches: Sequence[Branch], size: tuple[int, int]) -> Deferred:
        """Promise `branches`, resized to `size` and concatenated."""
        first = branches[0].x
        shape = (len(first), sum(branch.x.shape[1] for branch in branches), *size)
        promise: Deferred = Tensor._make_wrapper_subclass(
            Deferred, shape, dtype=first.dtype, device=first.device
        )
        promise.branches = tuple(branches)
        promise.versions = _versions(branches)
        promise._made = None
        return promise

    def make(self) -> Tensor:
        """The promised tensor, by ordinary operations; the same one every time."""
        if self._made is None:
            self.check()
            with torch._C.DisableTorchFunctionSubclass():
                size = (self.shape[2], self.shape[3])
            maps = [x if how is None else how(x, size) for x, how in self.branches]
            self._made = maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
        return self._made

    def check(self) -> None:
        """Refuse to go on if a branch was overwritten since."""
        if self.versions != _versions(self.branches):
            raise RuntimeError(
                "a feature map was changed in place between its upsampling and the convolution"
                " that reads it: this network cannot be accelerated, undo it"
            )

    @classmethod
    def __torch_function__(
        cls,
        func: Function,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what needs no values; make the tensors for everything else."""
        if _is_look(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*map(made, args), **{name: made(x) for name, x in (kwargs or {}).items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Reached from within C++, past `__torch_function__`."""
        return func(*map(made, args), **{name: made(x) for name, x in (kwargs or {}).items()})


def made(value: Any) -> Any:
    """Replace every promise in nested tuples, lists and mappings by its tensor."""
    if isinstance(value, Deferred):
        return value.make()
    if type(value) in (list, tuple):
        return type(value)(map(made, value))
    if isinstance(value, dict) and any(isinstance(x, Deferred) for x in value.values()):
        for name, x in value.items():  # in place: outputs of Hugging Face are dicts of own types
            value[name] = made(x)
    return value


def _is_look(func: Function) -> bool:
    name = getattr(getattr(func, "__self__", None), "__name__", None)
    return func in (Tensor.size, Tensor.dim, Tensor.numel) or (
        getattr(func, "__name__", "") == "__get__" and name in LOOKS
    )


class Deferring(TorchFunctionMode):
    """Defers resizing and concatenating, and fuses convolutions of what was deferred.

    Attributes:
        fused: weights of the convolutions that were fused, and how many of their branches.
        force: "fused" to fuse wherever possible, or None to go by measured costs.
    """

    def __init__(self, force: str | None = None) -> None:
        super().__init__()
        self.force = force
        self.fused: list[tuple[Tensor, int]] = []
        self._promises: weakref.WeakSet[Deferred] = weakref.WeakSet()

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
            self._make_before_writing((*args, *kwargs.values()))
        return func(*args, **kwargs)

    def promise(self, branches: Sequence[Branch], size: tuple[int, int]) -> Deferred:
        """A promise that is watched for writing to its branches."""
        promise = Deferred.of(branches, size)
        self._promises.add(promise)
        return promise

    def _make_before_writing(self, values: Sequence[Any]) -> None:
        written = {_storage(value) for value in values if type(value) is Tensor}
        for promise in list(self._promises):
            if any(_storage(branch.x) in written for branch in promise.branches):
                promise.make()


def _versions(branches: Sequence[Branch]) -> tuple[int, ...]:
    """How often each map was written to; inference tensors do not count."""
    return tuple(0 if branch.x.is_inference() else branch.x._version for branch in branches)


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
    mode_: Deferring,
    input: Tensor,  # noqa: A002  # interpolate's own name
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    x = made(input)
    if antialias or recompute_scale_factor or x.ndim != 4 or mode not in ("nearest", "bilinear"):
        return None
    size = _whole_size(x, size, scale_factor)
    if size is None or not _is_ordinary(x):
        return None
    how = Resampling(mode, bool(align_corners))
    return mode_.promise([Branch(x, how)], size) if size != tuple(x.shape[2:]) else None


def _whole_size(x: Tensor, size: Any, scale_factor: Any) -> tuple[int, int] | None:
    """The size asked for, if the scale factor says nothing that it does not."""
    if size is not None:
        pair = (size, size) if isinstance(size, int) else tuple(int(side) for side in size)
        return (pair[0], pair[1])
    factors = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,) * 2
    sides = [side * float(factor) for side, factor in zip(x.shape[2:], factors, strict=True)]
    if any(side != int(side) for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def _is_ordinary(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_floating_point() and x.device.type in ("cpu", "cuda")


def _cat(mode_: Deferring, tensors: Sequence[Tensor], dim: int = 0, **others: Any) -> Any:
    if others or dim not in (1, -3) or not any(map(_is_pending, tensors)):
        return None
    sizes, dtypes = {tuple(x.shape[2:]) for x in tensors}, {x.dtype for x in tensors}
    if len(sizes) > 1 or len(dtypes) > 1:
        return None
    branches: list[Branch] = []
    for x in tensors:
        if isinstance(x, Deferred) and x._made is None:
            x.check()
            branches += x.branches
        elif _is_ordinary(x := made(x)):
            branches.append(Branch(x, None))
        else:
            return None
    (height, width), *_ = sizes
    return mode_.promise(branches, (height, width))


def _is_pending(x: Tensor) -> bool:
    return isinstance(x, Deferred) and x._made is None


def _conv2d(
    mode_: Deferring,
    input: Tensor,  # noqa: A002  # conv2d's own name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if not isinstance(input, Deferred) or input._made is not None or groups != 1:
        return None
    if isinstance(padding, str):
        return None
    input.check()
    size = (input.shape[2], input.shape[3])
    how = next(branch.resampling for branch in input.branches if branch.resampling)
    axes = zip(weight.shape[2:], *map(_pair, (stride, padding, dilation)), strict=True)
    rows, columns = (Window(*axis) for axis in axes)
    maps = [x if other in (None, how) else other(x, size) for x, other in input.branches]
    result = convolve_branches(maps, weight, bias, Geometry(size, rows, columns, how), mode_.force)
    if result is None:
        return None
    convolved, fused = result
    mode_.fused.append((weight, sum(fused)))
    return convolved


def _dropout(
    mode_: Deferring,
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
