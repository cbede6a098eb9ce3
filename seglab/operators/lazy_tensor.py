"""LazyTensor: a resized or concatenated map that is computed when something reads it.

It remembers its branches and the grad mode it was created in, and takes part in autograd like the
map itself. Three kinds of readers:

- a convolution that `lazy_mode.py` fuses reads the branches, at their own resolution;
- a torch function called from Python gets the map, computed by interpolate and cat in the grad
  mode of its creation, whatever the reader's;
- readers below Python (autograd functions, scripted functions, vmap) get the map's values, and
  their gradients reach the branches through the LazyTensor's own node in the graph.

What would need the gradient of the map itself (`retain_grad`, hooks, `autograd.grad`) is refused
with `LazyTensorError`: a fused convolution never computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seglab.operators.nested import replace_tensors
from seglab.operators.resampling import Resampling
from seglab.torch_internals import (
    Unwatched,
    UnwatchedBySubclasses,
    has_gradient_hooks,
    tensor_without_memory,
    version,
    writes_in_place,
)

Function = Callable[..., Any]

QUERIES = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_leaf"}
    | {"requires_grad"}
)
"""Attributes that are answered without computing the map."""

QUERY_FUNCTIONS = frozenset(
    {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point}
)

GRADIENT_ATTRIBUTES = frozenset(
    {"grad", "_grad", "grad_fn", "_backward_hooks", "retains_grad", "output_nr"}
)
GRADIENT_FUNCTIONS = frozenset(
    {Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad}
    | {torch.autograd.grad, torch.autograd.backward}
)
"""What asks for the gradient of the map itself."""


class LazyTensorError(RuntimeError):
    """A map was used in a way that a map which was never computed cannot serve.

    Attributes:
        calls: numbers, in the forward pass, of the resizing calls that the map came from.
    """

    def __init__(self, what: str, calls: frozenset[int]) -> None:
        super().__init__(
            f"{what}: the accelerated network cannot do that. Call `undo` of its Acceleration, or"
            " `accelerate` it again as it is used now"
        )
        self.calls = calls


class Branch(NamedTuple):
    """A map, and how it is to be resized (None: not at all)."""

    x: Tensor
    resampling: Resampling | None


@dataclass(eq=False)
class Recipe:
    """How the map of a LazyTensor is computed.

    Attributes:
        branches: the maps that are resized and concatenated, detached if created without grad.
        size: height and width they are resized to.
        calls: numbers of the resizing calls that it came from.
        grad: grad mode at creation.
        inference: inference mode at creation.
        versions: of the branches at creation.
        value: the map with its place in the graph, once a torch function has read it.
        is_fused: whether a convolution read the branches instead.
        is_returned: whether `value` left the network among its outputs.
    """

    branches: tuple[Branch, ...]
    size: tuple[int, int]
    calls: frozenset[int]
    grad: bool
    inference: bool
    versions: tuple[int, ...]
    value: Tensor | None = None
    is_fused: bool = False
    is_returned: bool = False

    @staticmethod
    def of(branches: Sequence[Branch], size: tuple[int, int], calls: frozenset[int]) -> Recipe:
        """Take note of the branches as they are now."""
        kept = tuple(Branch(_as_it_is(branch.x), branch.resampling) for branch in branches)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return Recipe(kept, size, calls, *modes, _versions(kept))

    def compute(self) -> Tensor:
        """Resize and concatenate, by ordinary operations in the grad mode of now."""
        self.check()
        maps = [x if how is None else how(x, self.size) for x, how in self.branches]
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)

    def materialize(self) -> Tensor:
        """The map, in the graph of its creation; the same tensor every time."""
        if self.value is None:
            inference, grad = self.inference, self.grad and not self.inference
            with Unwatched(), torch.inference_mode(inference), torch.set_grad_enabled(grad):
                self.value = self.compute()
        return self.value

    def check(self) -> None:
        """Refuse to go on if a branch was overwritten since."""
        if self.versions != _versions(self.branches):
            raise LazyTensorError(
                "a feature map was changed in place between its upsampling and what reads it",
                self.calls,
            )

    def gradients(self, grad: Tensor) -> Iterator[Tensor]:
        """Gradients of the branches, from that of the map; differentiable."""
        if self.value is not None and (self.is_returned or _has_history_of_its_own(self.value)):
            raise LazyTensorError(
                "an upsampled map that was returned or changed in place was also read by an"
                " autograd function, a scripted function or vmap",
                self.calls,
            )
        parts = torch.split(grad, [branch.x.shape[1] for branch in self.branches], dim=1)
        for (x, how), part in zip(self.branches, parts, strict=True):
            yield part if how is None else _resize_back(part, x.shape, how)


def _as_it_is(x: Tensor) -> Tensor:
    """The map as its reader would have found it now.

    Writing to inference tensors leaves no version behind, hence a copy: it is small beside what
    resizing would have made.
    """
    if x.is_inference():
        return x.clone()
    return x if torch.is_grad_enabled() or not x.requires_grad else x.detach()


def _versions(branches: Sequence[Branch]) -> tuple[int, ...]:
    """How often each map was written to; those of inference are copies of our own."""
    return tuple(0 if branch.x.is_inference() else version(branch.x) for branch in branches)


def _has_history_of_its_own(value: Tensor) -> bool:
    return version(value) > 0 or value.retains_grad or has_gradient_hooks(value)


def _resize_back(grad: Tensor, shape: torch.Size, how: Resampling) -> Tensor:
    """Gradient of `how(x, size)` with regard to x of `shape`."""
    sizes: tuple[Any, Any] = list(grad.shape[2:]), list(shape)
    if list(grad.shape[2:]) == list(shape[2:]):
        return grad
    if how.mode == "nearest":
        nearest: Tensor = torch.ops.aten.upsample_nearest2d_backward(grad, *sizes)
        return nearest
    back: Tensor = torch.ops.aten.upsample_bilinear2d_backward(grad, *sizes, how.align_corners)
    return back


class _Create(torch.autograd.Function):
    """The node of a LazyTensor in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *maps: Tensor) -> Tensor:
        ctx.recipe = recipe
        shape = (len(maps[0]), sum(x.shape[1] for x in maps), *recipe.size)
        return tensor_without_memory(LazyTensor, shape, maps[0].dtype, maps[0].device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.recipe.gradients(grads[0])


class LazyTensor(Tensor):
    """A map (B, C, H, W): branches, resized to H x W and concatenated, but not yet.

    Attributes:
        recipe: how it is computed.
    """

    recipe: Recipe

    @staticmethod
    def of(recipe: Recipe) -> LazyTensor:
        """A tensor of the shape, dtype and place in the graph that the map would have."""
        lazy: LazyTensor = _Create.apply(recipe, *(branch.x for branch in recipe.branches))
        lazy.recipe = recipe
        return lazy

    def materialize(self) -> Tensor:
        """Compute the map, or return the one computed before."""
        with Unwatched():
            if not self.is_inference() and version(self) > 0:
                raise LazyTensorError("an upsampled map was changed in place", self.recipe.calls)
        return self.recipe.materialize()

    @classmethod
    def __torch_function__(
        cls,
        func: Function,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer what needs no values; compute the maps for everything else."""
        kwargs = kwargs or {}
        owners: dict[int, LazyTensor] = {}

        def value_of(x: Tensor) -> Tensor:
            if not isinstance(x, LazyTensor):
                return x
            value = x.materialize()
            owners[id(value)] = x
            return value

        if _is_query(func, args):
            with UnwatchedBySubclasses():
                return func(*args, **kwargs)
        _refuse_gradients(func, args, kwargs)
        arguments = [replace_tensors(x, value_of, in_place=False) for x in args]
        named = {name: replace_tensors(x, value_of, in_place=False) for name, x in kwargs.items()}
        result = func(*arguments, **named)
        _refuse_new_history(owners)
        # The map itself stays hidden: what returns its argument returns the LazyTensor.
        return replace_tensors(result, lambda x: owners.get(id(x), x))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Reached from below Python, past `__torch_function__`; autograd has noted the call."""
        lazies: list[LazyTensor] = []

        def values(x: Tensor) -> Tensor:
            if not isinstance(x, LazyTensor):
                return x
            lazies.append(x)
            value = x.recipe.value
            return x.recipe.compute() if value is None else value.detach()

        with Unwatched():
            arguments = [replace_tensors(x, values, in_place=False) for x in args]
            named = {
                name: replace_tensors(x, values, in_place=False)
                for name, x in (kwargs or {}).items()
            }
            if lazies and writes_in_place(func):
                calls = frozenset().union(*(x.recipe.calls for x in lazies))
                raise LazyTensorError("compiled code changed an upsampled map in place", calls)
            return func(*arguments, **named)


def finish(output: Any) -> Any:
    """Replace the LazyTensors among a network's outputs by their maps.

    Raises:
        LazyTensorError: a map that a fused convolution read; its gradient would lack that part.
    """

    def value_of(x: Tensor) -> Tensor:
        if not isinstance(x, LazyTensor):
            return x
        value = x.materialize()
        if x.recipe.is_fused and value.requires_grad:
            raise LazyTensorError(
                "the network returns an upsampled map that a convolution reads too", x.recipe.calls
            )
        x.recipe.is_returned = True
        return value

    return replace_tensors(output, value_of)


def _is_query(func: Function, args: Sequence[Any]) -> bool:
    name = _attribute(func, "__get__")
    if name == "requires_grad":  # of a map that was computed: writing to it may have changed that
        return isinstance(args[0], LazyTensor) and args[0].recipe.value is None
    return name in QUERIES or func in QUERY_FUNCTIONS


def _attribute(func: Function, access: str) -> str | None:
    """Name of the attribute that a property's method stands for."""
    if getattr(func, "__name__", "") != access:
        return None
    return getattr(getattr(func, "__self__", None), "__name__", None)


def _refuse_gradients(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    lazies: list[LazyTensor] = []

    def collect(x: Tensor) -> Tensor:
        if isinstance(x, LazyTensor):
            lazies.append(x)
        return x

    asks = func in GRADIENT_FUNCTIONS or _attribute(func, "__get__") in GRADIENT_ATTRIBUTES
    sets = func is Tensor.requires_grad_ or _attribute(func, "__set__") in (
        GRADIENT_ATTRIBUTES | {"requires_grad"}
    )
    if not asks and not sets:
        return
    replace_tensors([*args, *kwargs.values()], collect, in_place=False)
    if sets or any(x.requires_grad for x in lazies):
        calls: frozenset[int] = frozenset().union(*(x.recipe.calls for x in lazies))
        raise LazyTensorError(
            "something asks for the gradient of an upsampled map, or sets it", calls
        )


def _refuse_new_history(owners: Mapping[int, LazyTensor]) -> None:
    """Refuse writing that makes a map require grad: its LazyTensor was created without."""
    for lazy in owners.values():
        value = lazy.recipe.value
        assert value is not None
        with UnwatchedBySubclasses():
            if value.requires_grad and not lazy.requires_grad:
                raise LazyTensorError(
                    "a map that was upsampled without grad got a gradient by writing to it",
                    lazy.recipe.calls,
                )
