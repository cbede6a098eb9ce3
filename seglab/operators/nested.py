"""Replace tensors anywhere in a nested structure: containers, named tuples, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, MutableMapping, MutableSequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Replace = Callable[[Tensor], Tensor]


def replace_tensors(value: Any, replace: Replace, *, in_place: bool = True) -> Any:
    """Apply `replace` to every tensor in lists, tuples, mappings, dataclasses and pytree nodes.

    Args:
        value: anything; what is none of these is left alone.
        replace: returns the tensor to put in its place, or the same one.
        in_place: change containers that can be changed, instead of copies. Containers without a
            replaced tensor are returned as they are.

    >>> replace_tensors({"a": [1, 2]}, lambda x: x)
    {'a': [1, 2]}
    """
    return _Walk(replace, in_place).visit(value)


class _Walk:
    def __init__(self, replace: Replace, in_place: bool) -> None:
        self.replace = replace
        self.in_place = in_place
        self._open: set[int] = set()  # containers being visited, which may contain themselves

    def visit(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.replace(value)
        if value is None or isinstance(value, str | int | float | type) or id(value) in self._open:
            return value
        self._open.add(id(value))
        try:
            return self._visit_container(value)
        finally:
            self._open.discard(id(value))

    def _visit_container(self, value: Any) -> Any:
        if isinstance(value, MutableMapping):
            return self._visit_items(value, list(value.items()))
        if isinstance(value, MutableSequence | deque):
            return self._visit_items(value, list(enumerate(value)))
        if isinstance(value, tuple):
            return self._visit_tuple(value)
        if dataclasses.is_dataclass(value):
            return self._visit_fields(value)
        return self._visit_node(value)

    def _visit_items(self, container: Any, items: list[tuple[Any, Any]]) -> Any:
        changed = {}
        for key, item in items:
            new = self.visit(item)
            if new is not item:
                changed[key] = new
        if not changed:
            return container
        if not self.in_place:
            container = copy.copy(container)
        for key, new in changed.items():
            container[key] = new
        return container

    def _visit_tuple(self, value: tuple[Any, ...]) -> Any:
        new = [self.visit(item) for item in value]
        if all(x is y for x, y in zip(new, value, strict=True)):
            return value
        make = getattr(type(value), "_make", type(value))  # of named tuples
        return make(new)

    def _visit_fields(self, value: Any) -> Any:
        present = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        old = {name: getattr(value, name) for name in present}
        new = {name: self.visit(item) for name, item in old.items()}
        changed = {name: item for name, item in new.items() if item is not old[name]}
        if changed and not self.in_place:
            value = copy.copy(value)
        for name, item in changed.items():
            object.__setattr__(value, name, item)  # frozen ones too
        return value

    def _visit_node(self, value: Any) -> Any:
        """Types that their libraries have registered as pytree nodes."""
        node = pytree.SUPPORTED_NODES.get(type(value))
        if node is None:
            return value
        children, context = node.flatten_fn(value)
        new = [self.visit(child) for child in children]
        if all(x is y for x, y in zip(new, children, strict=True)):
            return value
        return node.unflatten_fn(new, context)
