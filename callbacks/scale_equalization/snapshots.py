"""Objects and random streams exactly as they were before they were used for measuring.

Restored in place, because copies cannot be made of everything (open files, locks), while what
changes in use is nearly always a number, a container or a random generator.
"""

from __future__ import annotations

import copy
import dis
import functools
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .reachable import (
    attributes,
    codes_of,
    is_of_its_own,
    is_random_generator,
    is_users,
    reachable,
    slots,
)

LARGEST = 2**20  # bytes of an array or tensor that may be a counter; larger ones are data
LARGEST_OF_A_MODULE = 2**28  # of a tensor that a network keeps, a memory bank
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)


@contextmanager
def as_before(*owners: Any, but: Collection[int] = ()) -> Iterator[None]:
    """Attributes, containers and random generators in reach of `owners` as before, on leaving.

    So are, of the user's own functions and classes (`reachable.is_users`), the globals that they
    assign to, their closures, and class attributes.

    Not restored: arrays above `LARGEST` (a network's tensors above `LARGEST_OF_A_MODULE`),
    positions of iterators and files, and what classes written in C keep to themselves.

    Args:
        *owners: Loaders, data sets, modules: anything.
        but: Ids of objects that are left as they are.
    """
    with ExitStack() as stack:
        for value in reachable(*owners, but=but):
            for restore in _restorers(value):
                stack.callback(restore)
        yield


@contextmanager
def same_random_streams() -> Iterator[None]:
    """Python's, NumPy's, torch's and every CUDA device's random state as before."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    cpu = torch.get_rng_state()
    cuda: list[Tensor] = torch.cuda.get_rng_state_all() if _cuda_is_running() else []
    try:
        yield
    finally:
        random.setstate(python)
        if numpy_state is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's CPU streams from a seed inside, as before on leaving."""
    with same_random_streams():
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        yield


def iterators_in(*owners: Any) -> list[str]:
    """Class names of the iterators and files in reach, whose positions cannot be restored."""
    found = (v for v in reachable(*owners) if hasattr(type(v), "__next__"))
    return sorted({type(v).__name__ for v in found if not attributes(v)})


def _cuda_is_running() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _restorers(value: Any) -> Iterator[Callable[[], Any]]:
    if is_random_generator(value):
        yield _generator_restorer(value)
    elif isinstance(value, types.FunctionType):
        yield from _function_restorers(value)
    elif isinstance(value, type):
        if is_users(value):
            yield functools.partial(_reset_class, value, dict(vars(value)))
    elif type(value) in _MAPPINGS:
        yield functools.partial(_refill, value, dict(value))
    elif type(value) in (list, set, deque):
        yield functools.partial(_refill, value, list(value))
    elif attributes(value):
        own = {k: v for k, v in attributes(value).items() if is_of_its_own(value, k)}
        yield functools.partial(_reset_attributes, value, own)
        largest = LARGEST_OF_A_MODULE if isinstance(value, nn.Module) else LARGEST
        for item in own.values():
            yield from _array_restorers(item, largest)
    if not isinstance(value, (type, types.FunctionType, Tensor)) and is_users(type(value)):
        for place, held in slots(value):
            yield functools.partial(_reset_slot, place, value, held)
            yield from _array_restorers(held)


def _function_restorers(function: types.FunctionType) -> Iterator[Callable[[], Any]]:
    """The variables that a function of the user's assigns to outside itself."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            yield functools.partial(_reset_cell, cell, cell.cell_contents)
            yield from _array_restorers(cell.cell_contents)
    if is_users(function):
        names = function.__globals__
        assigned = set().union(*map(_assigned_globals, codes_of(function)))
        for name in assigned & names.keys():
            yield functools.partial(names.__setitem__, name, names[name])


@functools.cache
def _assigned_globals(code: types.CodeType) -> frozenset[str]:
    steps = dis.get_instructions(code)
    return frozenset(step.argval for step in steps if step.opname == "STORE_GLOBAL")


def _reset_cell(cell: types.CellType, before: Any) -> None:
    cell.cell_contents = before


def _reset_slot(place: Any, value: Any, before: Any) -> None:
    with suppress(AttributeError):  # a frozen dataclass
        place.__set__(value, before)


def _reset_class(kind: type, before: dict[str, Any]) -> None:
    now = dict(vars(kind))
    for name in (name for name in now if name not in before and not name.startswith("__")):
        delattr(kind, name)
    for name, item in before.items():
        if not name.startswith("__") and (name not in now or now[name] is not item):
            setattr(kind, name, item)


def _array_restorers(value: Any, largest: int = LARGEST) -> Iterator[Callable[[], Any]]:
    if getattr(value, "nbytes", largest) >= largest or isinstance(value, nn.Parameter):
        return
    if isinstance(value, Tensor):
        yield functools.partial(_copy_values, value, value.detach().clone())
    elif type(value).__module__ == "numpy" and value.ndim and value.flags.writeable:
        yield functools.partial(value.__setitem__, ..., value.copy())


def _copy_values(old: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        if not torch.equal(old, new):
            old.copy_(new)


def _refill(container: Any, items: Any) -> None:
    """Give a container its items back, without touching it if they are still there."""
    if isinstance(items, dict):
        same = list(container) == list(items) and all(container[k] is items[k] for k in items)
    else:
        same = len(container) == len(items)
        same = same and all(a is b for a, b in zip(container, items, strict=True))
    if same:
        return
    container.clear()
    container.extend(items) if isinstance(container, (list, deque)) else container.update(items)


def _reset_attributes(value: Any, before: dict[str, Any]) -> None:
    own = attributes(value)
    for name in [name for name in own if name not in before and is_of_its_own(value, name)]:
        del own[name]
    for name, item in before.items():
        if name not in own or own[name] is not item:
            own[name] = item


def _generator_restorer(value: Any) -> Callable[[], Any]:
    """A call that sets a random generator back to where it is now."""
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if hasattr(value, "set_state"):  # torch's, and NumPy's RandomState
        return functools.partial(value.set_state, value.get_state())
    bits = getattr(value, "bit_generator", value)
    return functools.partial(setattr, bits, "state", copy.deepcopy(bits.state))
