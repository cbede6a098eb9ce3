"""What is noted while a forward pass is watched: calls of linear layers, and what else was met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from . import operations as ops
from .notes import Join, Note


@dataclass(eq=False)
class Call:
    """One call of a linear layer.

    Attributes:
        number: Its place in the order of the forward pass.
        key: Identity of the trained weight, negative for a computed weight.
        module: Name of the module that made the call.
        kind: "conv2d", "linear", ...
        func: The function called.
        args: Its arguments.
        kwargs: Its keyword arguments.
        note: What is known of its input.
        rank: Number of dimensions of its input.
        layer_input: The module's input, which padding may have changed since.
    """

    number: int
    key: int
    module: str
    kind: str
    func: Any = field(repr=False)
    args: Sequence[Any] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    note: Note = field(repr=False)
    rank: int
    layer_input: Any = field(default=None, repr=False)

    @property
    def input(self) -> Tensor:
        """What the function is called with."""
        found: Tensor = ops.argument(self.args, self.kwargs, 0, "input")
        return found

    @property
    def weight(self) -> Tensor:
        """The weight as it was passed."""
        found: Tensor = ops.argument(self.args, self.kwargs, 1, "weight")
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias as it was passed."""
        found: Tensor | None = ops.argument(self.args, self.kwargs, 2, "bias")
        return found

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1."""
        if self.kind == "linear":
            return 1
        return int(ops.argument(self.args, self.kwargs, 6, "groups", 1))

    @property
    def dim(self) -> int:
        """The channel dimension of the input."""
        return self.rank - 1 - ops.CONSUMERS[self.kind]

    @property
    def values(self) -> Tensor:
        """The layer's input: before its own padding, where that is an operation by itself."""
        inner, outer = self.input, self.layer_input
        if (
            isinstance(outer, Tensor)
            and outer is not inner
            and outer.dim() == inner.dim()
            and outer.shape[: self.dim + 1] == inner.shape[: self.dim + 1]
        ):
            return outer
        return inner

    def without_tensors(self) -> Call:
        """The call as a note that keeps no feature map alive; the weight stays."""
        args: Sequence[Any] = [None if isinstance(arg, Tensor) else arg for arg in self.args]
        kwargs = {k: v for k, v in self.kwargs.items() if not isinstance(v, Tensor)}
        args, kwargs = ops.replaced(args, kwargs, 1, "weight", self.weight)
        return replace(self, args=args, kwargs=kwargs, layer_input=None)

    def run(self, **other: Any) -> Tensor:
        """The result, with another `input`, `weight` or `bias` if given."""
        args, kwargs = self.args, self.kwargs
        for index, name in enumerate(("input", "weight", "bias")):
            if name in other:
                args, kwargs = ops.replaced(args, kwargs, index, name, other[name])
        result: Tensor = self.func(*args, **kwargs)
        return result

    def respond(self, weight: Tensor) -> Tensor:
        """The result with another weight and no bias."""
        return self.run(weight=weight, bias=None)


@dataclass(eq=False)
class Log:
    """What one watched forward pass has shown, in names.

    Attributes:
        joins: Every join outside the encoder.
        norms: For each weight, the normalization that directly follows its layer.
        cancelled: The same, with homogeneous operations such as ReLU in between.
        followers: The normalization module behind a layer, of any kind, before the next layer.
        uses: For each parameter, the operations other than its layer that took it.
        sums: Modules that add maps of different levels.
        lost: Modules that take a joined map where it is not followed, each with the reason.
        seen: Every concatenation met, as text.
        single_value_norms: Batch normalizations that had one value per channel.
    """

    joins: list[Join] = field(default_factory=list)
    norms: dict[int, str] = field(default_factory=dict)
    cancelled: dict[int, str] = field(default_factory=dict)
    followers: dict[int, str] = field(default_factory=dict)
    uses: dict[int, list[str]] = field(default_factory=dict)
    sums: list[str] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    single_value_norms: int = 0
