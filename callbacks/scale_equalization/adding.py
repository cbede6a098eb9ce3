"""Finds additions that fuse levels, and the layers that can be scaled in a summand's stead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import operations as ops
from .patterns import matches
from .tracer import Tracer

Place = tuple[str, int]  # module an addition happens in, and its number there
_NORMS = frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm"})


@dataclass(eq=False)
class _Link:
    """A tensor between a producer and whatever uses it.

    Attributes:
        producer: Name of the module whose weight and bias scale it; "" if there is none.
        before: The tensor it was made from, up to the producer's output.
        uses: Operations that took it.
    """

    producer: str
    before: _Link | None = None
    uses: int = 0

    def free_producer(self) -> str:
        """The producer, if nothing but one chain of operations hangs on its output."""
        link: _Link | None = self
        while link is not None:
            if link.uses != 1:
                return ""
            link = link.before
        return self.producer


@dataclass(frozen=True)
class SumFusion:
    """An addition of two maps of different levels.

    Attributes:
        place: Where it happens.
        sources: Modules that made the summands.
        producers: For each, the module that can be scaled in its stead; "" for none.
    """

    place: Place
    sources: tuple[str, str]
    producers: tuple[str, str]


class SumWatcher(Tracer):
    """A tracer that also knows additions by their place."""

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        super().__init__(model, exclude=exclude)
        self.counts: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = ops.name_of(func)
        if name == "add" and _adds_two_maps(args, kwargs):
            place = (self.module, self.counts[self.module])
            self.counts[self.module] += 1
            args = self._adding(place, args)
            result = super().__torch_function__(func, types, args, kwargs)
            self._added(place, args)
            return result
        self._using(name, args, kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        self._made_by(name, args, kwargs, result)
        return result

    def _adding(self, place: Place, args: Sequence[Any]) -> Sequence[Any]:
        return args

    def _added(self, place: Place, args: Sequence[Any]) -> None:
        """Listen after an addition."""

    def _using(self, name: str, args: Sequence[Any], kwargs: Any) -> None:
        """Listen before any other operation."""

    def _made_by(self, name: str, args: Sequence[Any], kwargs: Any, result: Any) -> None:
        """Listen after any other operation."""


class SumFinder(SumWatcher):
    """Collects the additions that fuse levels, with the producers of their summands."""

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        super().__init__(model, exclude)
        self.modules = dict(model.named_modules())
        self.exclude = tuple(exclude)
        self.links: dict[int, tuple[Tensor, _Link]] = {}
        self.found: list[tuple[Place, tuple[str, str], tuple[_Link, _Link]]] = []

    def _link(self, tensor: Tensor) -> _Link:
        known = self.links.get(id(tensor))
        return known[1] if known else _Link("", uses=2)

    def _using(self, name: str, args: Sequence[Any], kwargs: Any) -> None:
        if name not in ops.QUERIES | ops.DROPOUTS:
            for tensor in ops.tensors_in((*args, *kwargs.values())):
                self._link(tensor).uses += 1

    def _made_by(self, name: str, args: Sequence[Any], kwargs: Any, result: Any) -> None:
        if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        if name in _NORMS or name in ops.CONSUMERS:
            self.links[id(result)] = (result, _Link(self._scalable_module()))
        elif self._keeps_scale(name, args, kwargs):
            before = self._link(args[0])
            self.links[id(result)] = (result, _Link(before.producer, before))

    def _keeps_scale(self, name: str, args: Sequence[Any], kwargs: Any) -> bool:
        if name in ops.RESIZES:
            return True
        return name in ops.HOMOGENEOUS and ops.is_homogeneous(name, args, kwargs, True)

    def _scalable_module(self) -> str:
        """The running module, if its weight and bias alone scale its output."""
        module = self.modules.get(self.module)
        excluded = matches(self.module, self.exclude) or self.module in self.encoder
        weight = getattr(module, "weight", None)
        return self.module if isinstance(weight, nn.Parameter) and not excluded else ""

    def _adding(self, place: Place, args: Sequence[Any]) -> Sequence[Any]:
        self.level_sums = len(self.trace.sums)
        for tensor in args[:2]:
            self._link(tensor).uses += 1
        self.sources = tuple(self._origin(tensor).source for tensor in args[:2])
        return args

    def _added(self, place: Place, args: Sequence[Any]) -> None:
        if len(self.trace.sums) > self.level_sums:
            first, second = (self._link(tensor) for tensor in args[:2])
            self.found.append((place, (self.sources[0], self.sources[1]), (first, second)))

    def fusions(self) -> tuple[SumFusion, ...]:
        """The sums found; call it when the forward pass is over and all uses are counted."""
        once = Counter(link.free_producer() for _, _, links in self.found for link in links)
        found = []
        for place, sources, (a, b) in self.found:
            first, second = a.free_producer(), b.free_producer()
            producers = first if once[first] == 1 else "", second if once[second] == 1 else ""
            found.append(SumFusion(place, sources, producers))
        return tuple(found)


def _adds_two_maps(args: Sequence[Any], kwargs: Any) -> bool:
    maps = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg.dim() > 2]
    return len(maps) == 2 and maps[0].shape == maps[1].shape and "alpha" not in kwargs
