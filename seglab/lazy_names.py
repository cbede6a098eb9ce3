"""Packages whose names are imported on first use: torch, timm and albumentations take seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that imports a name's module when asked for it.

    Args:
        package: its `__name__`.
        modules: the module of each public name; relative to the package if it begins with a dot.
    """
    public = sorted(modules)

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {public}")
        return getattr(import_module(modules[name], package), name)

    return get, lambda: list(public)
