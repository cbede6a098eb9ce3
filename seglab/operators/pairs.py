"""Find modules whose result goes to one other module and nowhere else, by watching a forward pass.

A convolution's result is followed from operator to operator: to be paired with a normalization it
must be read once, by that normalization, and be no part of what the network returns. The
convolution's weight must be read by that convolution alone. So what is found does not depend on
how a network writes its forward pass, and tied weights, second readers, concatenations and code
between the two are seen for what they are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seglab.torch_internals import DispatchMode, hooks_of, hooks_of_all_modules, parameters_of

LINEAR_MAPS = frozenset(
    {
        F.conv1d, F.conv2d, F.conv3d, F.linear,
        F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    }
)  # fmt: skip
TRANSPOSED = frozenset({F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d})


@dataclass(frozen=True)
class Pair:
    """A linear map and the one reader of its result, by their full names.

    Attributes:
        producer: Name of the convolution or linear layer.
        reader: Name of the module that reads what it returns.
        is_transposed: Whether the output channels are the second axis of its weight.
    """

    producer: str
    reader: str
    is_transposed: bool


@dataclass(frozen=True)
class Pairs:
    """What a forward pass showed.

    Attributes:
        found: Pairs; a reader occurs once for each of its producers.
        refused: Why the other acceptable readers that ran have no producer, by their names.
    """

    found: tuple[Pair, ...]
    refused: Mapping[str, str]


def find_pairs(
    network: nn.Module, run: Callable[[nn.Module], Any], accepts: Callable[[nn.Module], str]
) -> Pairs:
    """Pair linear maps with acceptable readers of their results.

    Args:
        network: Runs in evaluation mode; only watched, though its `inplace` flags are set back.
        run: Runs the network.
        accepts: Returns an empty string for a module that may read, "-" for one that is none of
            the kind, or why one of the kind may not.
    """
    if any(hooks_of_all_modules()):
        return Pairs((), {"": "hooks of all modules see what lies between"})
    seen = _Log(network)
    _watch(network, run, seen)
    return _pair(network, seen, accepts)


@dataclass
class _Result:
    """What a linear map returned; kept, so that no other tensor gets its identity."""

    value: Tensor
    module: nn.Module
    is_transposed: bool
    is_seen_by_hook: bool = False


class _Log:
    """Who made and who read the results of linear maps, and who read their parameters."""

    def __init__(self, network: nn.Module) -> None:
        self.running: list[nn.Module] = []
        self.calls: Counter[nn.Module] = Counter()
        self.results: dict[int, _Result] = {}
        self.readers: dict[int, list[nn.Module | None]] = defaultdict(list)
        self.inputs: dict[nn.Module, int] = Counter()
        self.parameters = {id(x) for x in network.parameters()}

    def read(self, x: Any) -> None:
        if id(x) in self.results or id(x) in self.parameters:
            self.readers[id(x)].append(self.running[-1] if self.running else None)

    def made(self, x: Any, is_transposed: bool) -> None:
        self.results[id(x)] = _Result(x, self.running[-1], is_transposed)


class _Functions(TorchFunctionMode):
    """Sees linear maps with the parameters of the module that is running."""

    def __init__(self, log: _Log) -> None:
        super().__init__()
        self.log = log

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in LINEAR_MAPS and self.log.running:
            own = parameters_of(self.log.running[-1])
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            weight, bias = given.get("weight"), given.get("bias")
            if weight is not None and weight is own.get("weight") and bias is own.get("bias"):
                self.log.made(result, func in TRANSPOSED)
        return result


class _Operators(DispatchMode):  # type: ignore[misc]  # its type is private to torch
    """Sees every operator that reads a result or a parameter."""

    def __init__(self, log: _Log) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        for x in _tensors([args, kwargs or {}]):
            self.log.read(x)
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors anywhere in nested containers and records."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple, set)):
        for each in value:
            yield from _tensors(each)
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)):
        yield from _tensors(list(vars(value).values()))


def _watch(network: nn.Module, run: Callable[[nn.Module], Any], log: _Log) -> None:
    """Run with every module announced; without `inplace`, results are not their reader's."""
    in_place = [m for m in network.modules() if getattr(m, "inplace", False) is True]
    with ExitStack() as stack:
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
            stack.callback(setattr, module, "inplace", True)
        for module in network.modules():
            is_hooked = any(hooks_of(module))
            stack.callback(module.register_forward_pre_hook(_enter(log)).remove)
            stack.callback(
                module.register_forward_hook(_leave(log, is_hooked), always_call=True).remove
            )
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Functions(log))
        stack.enter_context(_Operators(log))
        output = run(network)
    for x in _tensors(output):
        log.running = []
        log.read(x)


def _enter(log: _Log) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        log.running.append(module)
        log.calls[module] += 1

    return hook


def _leave(log: _Log, is_hooked: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        log.running.pop()
        if is_hooked:
            for x in _tensors([args, output]):
                if id(x) in log.results:
                    log.results[id(x)].is_seen_by_hook = True

    return hook


def _pair(network: nn.Module, log: _Log, accepts: Callable[[nn.Module], str]) -> Pairs:
    names = {module: name for name, module in network.named_modules()}
    by_producer: dict[nn.Module, list[_Result]] = defaultdict(list)
    for result in log.results.values():
        by_producer[result.module].append(result)
    reader_of = {
        module: reader
        for module, results in by_producer.items()
        if (reader := _only_reader(module, results, log)) is not None
    }
    fed = Counter[nn.Module]()
    for module, reader in reader_of.items():
        fed[reader] += log.calls[module]
    found: list[Pair] = []
    refused: dict[str, str] = {}
    for reader, n_calls in log.calls.items():
        verdict = accepts(reader)
        if verdict == "-":
            continue
        if not verdict and fed[reader] != n_calls:
            verdict = "its input is not the result of one layer that nothing else reads"
        if verdict:
            refused[names[reader]] = verdict
            continue
        found += [
            Pair(names[module], names[reader], by_producer[module][0].is_transposed)
            for module, other in reader_of.items()
            if other is reader
        ]
    return Pairs(tuple(found), refused)


def _only_reader(module: nn.Module, results: Sequence[_Result], log: _Log) -> nn.Module | None:
    """The module that alone reads what a linear map returns; None if there is no such."""
    if len(results) != log.calls[module] or any(hooks_of(module)):
        return None
    own = [x for x in parameters_of(module).values() if x is not None]
    if any(log.readers[id(x)] != [module] * len(results) for x in own):
        return None
    readers = [log.readers[id(result.value)] for result in results]
    if any(len(each) != 1 for each in readers) or any(r.is_seen_by_hook for r in results):
        return None
    distinct = set(map(id, (each[0] for each in readers)))
    return readers[0][0] if len(distinct) == 1 else None
