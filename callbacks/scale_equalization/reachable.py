"""Every object in reach of another one, by attributes, containers, closures and globals.

State hides everywhere in data sets, samplers, transforms, modules and their hooks. Nothing is
called here and no property is read, so looking changes nothing. Globals are followed from the
user's own functions (of files outside site-packages), those that the code names; elsewhere only
generators.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = (str, bytes, bytearray, int, float, complex, type(None))
_BY_THEMSELVES = (*_ATOMS, Tensor, types.ModuleType)
# Ways to everything else: from a module to its trainer, from a loader to its workers.
_ELSEWHERE = ("_trainer", "trainer", "_fabric", "fabric", "_iterator")
_OF_A_MODULE = frozenset(nn.Module().__dict__)
_MANY = 10_000  # a container of more items holds data, no transforms
_LIBRARIES = frozenset(("torch", "numpy", "scale_equalization", *sys.stdlib_module_names))
_FOLLOWED = ("types", "argparse", "collections", "functools")  # of the standard library


def reachable(*owners: Any, but: Collection[int] = ()) -> Iterator[Any]:
    """Every object in reach, each once.

    Args:
        *owners: Where to begin; they are given too.
        but: Ids of objects to leave out, with what only they reach.
    """
    stack = list(owners)
    seen: dict[int, Any] = {}
    while stack:
        value = stack.pop()
        if id(value) in seen or id(value) in but:
            continue
        seen[id(value)] = value  # kept, so that no other object gets its id meanwhile
        yield value
        stack.extend(_held_by(value))


def attributes(value: Any) -> dict[str, Any]:
    """The `__dict__` of an object that may have state; else an empty one."""
    if isinstance(value, (type, types.FunctionType, types.ModuleType)) or _is_closed(_kind(value)):
        return {}
    own = getattr(value, "__dict__", None)
    return own if isinstance(own, dict) else {}


def is_of_its_own(value: Any, name: str) -> bool:
    """Whether an attribute is the class's own, not one that torch gives to every module.

    Those (`training`, buffers, hooks, ...) are for whoever knows what they mean.
    """
    return not (isinstance(value, nn.Module) and name in _OF_A_MODULE)


def _held_by(value: Any) -> Iterator[Any]:
    if isinstance(value, _BY_THEMSELVES) or _is_array(value) or is_random_generator(value):
        return
    if isinstance(value, (dict, list, tuple, set, frozenset, deque)) and len(value) <= _MANY:
        items = value.values() if isinstance(value, dict) else value
        yield from (item for item in items if not isinstance(item, _ATOMS))
    if isinstance(value, types.FunctionType):
        yield from _held_by_function(value)
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, property):
        yield from (value.fget, value.fset)
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, type):
        yield from _held_by_class(value)
    elif isinstance(value, nn.Module):
        skipped = (*_OF_A_MODULE, *_ELSEWHERE)
        yield type(value)
        yield from (v for k, v in value.__dict__.items() if k not in skipped)
        yield from value._modules.values()
        tables = (table for name, table in vars(value).items() if name.endswith("_hooks"))
        yield from (hook for table in tables if isinstance(table, dict) for hook in table.values())
    elif not _is_closed(_kind(value)):
        yield type(value)
        yield from (v for k, v in attributes(value).items() if k not in _ELSEWHERE)
        yield from _slots(value)


def _held_by_function(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            yield cell.cell_contents
    yield from (function.__defaults__, function.__kwdefaults__)
    own = _is_own(function.__globals__)
    for code in codes_of(function):
        named = [function.__globals__.get(name) for name in code.co_names]
        modules = [v for v in named if own and isinstance(v, types.ModuleType)]
        for module in modules:  # `helpers.draw()`: of the user's own modules
            if _is_own(vars(module)):
                named += [vars(module).get(name) for name in code.co_names]
        yield from (v for v in named if is_random_generator(v) or (own and _may_be_followed(v)))


def codes_of(function: types.FunctionType) -> Iterator[types.CodeType]:
    """The code of a function and of those written inside it."""
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        yield code


def is_users(value: Any) -> bool:
    """Whether a class or function is the user's own, of a file outside site-packages."""
    if isinstance(value, types.FunctionType):
        return _is_own(value.__globals__)
    module = sys.modules.get(value.__module__) if isinstance(value, type) else None
    return module is not None and _is_own(vars(module))


def _is_own(names: dict[str, Any]) -> bool:
    library = str(names.get("__name__", "")).partition(".")[0]
    path = str(names.get("__file__", ""))
    return library not in _LIBRARIES and "-packages" not in path


def _may_be_followed(value: Any) -> bool:
    """Not the trainer, say, that a script keeps in a global."""
    library = _library(value if isinstance(value, type) else type(value))
    return library not in ("lightning", "pytorch_lightning", "scale_equalization")


def _held_by_class(kind: type) -> Iterator[Any]:
    """Generators kept by a class, and its methods; all that the user's own classes keep."""
    for base in kind.__mro__:
        if _library(base) not in ("torch", *sys.stdlib_module_names):
            own = is_users(base)
            for value in vars(base).values():
                if own or isinstance(value, types.FunctionType) or is_random_generator(value):
                    yield value


def is_random_generator(value: Any) -> bool:
    """Whether an object is a random stream of Python's, NumPy's or torch's."""
    numpy: Any = sys.modules.get("numpy")
    kinds: tuple[type, ...] = (random.Random, torch.Generator)
    if numpy:
        own = numpy.random
        kinds += (own.RandomState, own.Generator, own.BitGenerator)
    return isinstance(value, kinds) and not isinstance(value, random.SystemRandom)


def _library(kind: type) -> str:
    return kind.__module__.partition(".")[0]


@functools.cache
def _is_closed(kind: Any) -> bool:
    """Objects of the standard library (locks, loggers, processes) are left to themselves."""
    library = _library(kind)
    return library in sys.stdlib_module_names and library not in _FOLLOWED


def _kind(value: Any) -> Any:
    return type(value)


def _is_array(value: Any) -> bool:
    return hasattr(type(value), "dtype") and hasattr(type(value), "nbytes")


def _slots(value: Any) -> Iterator[Any]:
    yield from (held for _, held in slots(value))


def slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """What an object keeps in `__slots__`: the descriptor and what is there."""
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            found = vars(kind).get(name)
            if isinstance(found, types.MemberDescriptorType):
                with suppress(AttributeError):  # declared, not set
                    yield found, found.__get__(value, kind)
