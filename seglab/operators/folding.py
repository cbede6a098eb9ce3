"""Fold batch normalizations into the layers before them, for inference.

In evaluation a batch normalization multiplies each channel by gamma / sqrt(var + eps) and adds a
constant. Where its input is the result of a convolution or linear layer that nothing else reads
(`pairs.py` finds out by watching), both go into that layer's weight and bias. Weights are computed
in float64 and rounded once.

Every change is proved: in float64 the network before and after must agree within 1e-10 of the
largest value of each output, and of what each normalization returned: outputs may be labels, or
hide what is wrong. If they do not, pairs are tried one by one and only those that keep all of it
are folded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from seglab.operators.comparison import Results, floating_tensors, overall_error
from seglab.operators.nested import replace_tensors
from seglab.operators.pairs import Pair, Pairs, find_pairs
from seglab.torch_internals import BatchNorm, children_of, hooks_of, parameters_of

EXACT = 1e-10
"""Largest difference allowed in float64, relative to the largest value of an output."""


@dataclass(frozen=True)
class Folding:
    """What was folded.

    Attributes:
        pairs: Layers and the normalizations that went into them.
        left: Why other batch normalizations were left alone, by name.
        error: Largest difference in float64 of an output or of what a normalization returned,
            relative to the largest value of it.
    """

    pairs: tuple[Pair, ...]
    left: Mapping[str, str]
    error: float

    @property
    def n_norms(self) -> int:
        """How many normalizations are gone."""
        return len({pair.reader for pair in self.pairs})

    def __str__(self) -> str:
        total = self.n_norms + len(self.left)
        text = f"{self.n_norms} of {total} batch normalizations folded"
        if not self.left:
            return text
        name, reason = next(iter(self.left.items()))
        more = f" and {len(self.left) - 1} others" if len(self.left) > 1 else ""
        return f"{text}; left alone: {name or 'all'}{more} ({reason})"


def fold_batch_norms_(network: nn.Module, *inputs: Any) -> Folding:
    """Fold, in place, every batch normalization that provably can be.

    Args:
        network: In evaluation mode. It can no longer be trained afterwards, and says so.
        inputs: Arguments to run it with; they may be smaller than those it is used with.

    Raises:
        ValueError: The network is in training mode.

    >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> print(fold_batch_norms_(network, torch.rand(1, 3, 8, 8)))
    1 of 1 batch normalizations folded
    >>> network
    Sequential(
      (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
      (1): FoldedNorm()
      (2): ReLU()
    )
    """
    if network.training:
        raise ValueError("the network is in training mode: call .eval() before folding")
    try:
        exact = copy.deepcopy(network).double()
        doubled = replace_tensors(inputs, _doubled, in_place=False)
        pairs = find_pairs(exact, lambda module: module(*doubled), foldable)
        norms = {pair.reader for pair in pairs.found}
        expected = _results_of(exact, norms, *doubled)
    except Exception as error:
        reason = f"the network does not run in float64: {type(error).__name__}: {error}"
        return Folding((), {"": " ".join(reason.split())[:200]}, 0.0)

    def error_of(trial: nn.Module) -> float:
        return overall_error(_results_of(trial, norms, *doubled), expected)

    kept, worst = _prove(exact, pairs, error_of)
    dropped = {p.reader for p in pairs.found} - {p.reader for p in kept}
    left = {**pairs.refused, **dict.fromkeys(dropped, "folded, the network computes otherwise")}
    _fold(network, kept)
    return Folding(kept, left, worst)


def foldable(module: nn.Module) -> str:
    """Whether a module is a batch normalization that is a fixed affine map: see `find_pairs`."""
    if not isinstance(module, BatchNorm):
        return "-"
    if module.training:
        return "in training mode"
    if module.running_mean is None or module.running_var is None:
        return "no running statistics"
    if any(hooks_of(module)):
        return "hooks look at it"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if _what_follows(module) is None:
        return f"{type(module).__name__} has a forward pass of its own"
    return ""


def _what_follows(norm: nn.Module) -> nn.Module | None:
    """What a normalization does besides normalizing, by trying it; None if that is not known.

    timm's bring dropout and an activation along.
    """
    tails: list[nn.Module] = [FoldedNorm()]
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    if isinstance(drop, nn.Module) and isinstance(act, nn.Module):
        tails.append(FoldedNorm(drop, act))
    return next((tail.eval() for tail in tails if _equals_affine_map(norm, tail)), None)


def _equals_affine_map(norm: Any, tail: nn.Module) -> bool:
    scale, shift = _affine_map(norm)
    generator = torch.Generator().manual_seed(0)
    for sides in ((3, 3), (), (3, 3, 3)):
        shape = (2, norm.num_features, *sides)
        x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x.to(norm.running_mean)
        try:
            with torch.no_grad():
                found = norm(x.clone())
                dims = (-1, *[1] * len(sides))
                expected = tail((x.double() * scale.view(dims) + shift.view(dims)).to(x.dtype))
        except (RuntimeError, ValueError):  # takes maps of another number of dimensions
            continue
        error = overall_error({"output": found}, {"output": expected})
        return bool(error <= torch.finfo(x.dtype).eps ** 0.5)
    return False


@torch.no_grad()
def _affine_map(norm: Any) -> tuple[Tensor, Tensor]:
    """Factor and summand of each channel, float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


class FoldedNorm(nn.Sequential):
    """What is left of a batch normalization: nothing, or the activation it brought along.

    Raises:
        RuntimeError: By `train()`: there are no statistics left to take.
    """

    def train(self, mode: bool = True) -> FoldedNorm:
        """Refuse training."""
        if mode:
            raise RuntimeError(
                "batch normalization was folded into the weights for inference: to train, load "
                "the checkpoint again without optimize"
            )
        super().train(False)
        return self


def _prove(
    exact: nn.Module, pairs: Pairs, error_of: Callable[[nn.Module], float]
) -> tuple[tuple[Pair, ...], float]:
    """Pairs that may be folded together, and the error of doing so."""
    groups = _groups(pairs.found)
    whole = [pair for group in groups for pair in group]
    if (error := _try(exact, whole, error_of)) <= EXACT:
        return tuple(whole), error
    alone = [group for group in groups if _try(exact, group, error_of) <= EXACT]
    together = [pair for group in alone for pair in group]
    error = _try(exact, together, error_of)
    return (tuple(together), error) if error <= EXACT else ((), 0.0)


def _groups(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs of one normalization, which go together."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.reader, []).append(pair)
    return list(groups.values())


def _try(exact: nn.Module, pairs: Sequence[Pair], error_of: Callable[[nn.Module], float]) -> float:
    trial = copy.deepcopy(exact)
    _fold(trial, pairs)
    try:
        return error_of(trial)
    except Exception:  # whatever a network does without its normalization
        return float("inf")


def _fold(network: nn.Module, pairs: Iterable[Pair]) -> None:
    modules = dict(network.named_modules())
    replaced: dict[nn.Module, nn.Module] = {}
    for pair in pairs:
        norm = modules[pair.reader]
        _fold_into(modules[pair.producer], norm, pair.is_transposed)
        replaced[norm] = _what_follows(norm) or FoldedNorm()
    for parent in list(network.modules()):
        for name, child in children_of(parent).items():
            if child in replaced:
                children_of(parent)[name] = replaced[child].eval()


@torch.no_grad()
def _fold_into(layer: Any, norm: Any, is_transposed: bool) -> None:
    weight, bias = parameters_of(layer)["weight"], parameters_of(layer).get("bias")
    assert weight is not None
    scale, shift = _affine_map(norm)
    if bias is not None:
        shift = shift + bias.double() * scale
    groups = getattr(layer, "groups", 1) if is_transposed else 1
    new = _scaled(weight.double(), scale, is_transposed, groups).to(weight.dtype)
    own = parameters_of(layer)
    own["weight"] = nn.Parameter(torch.empty_like(weight).copy_(new), requires_grad=False)
    own["bias"] = nn.Parameter(shift.to(weight.dtype), requires_grad=False)


def _scaled(weight: Tensor, scale: Tensor, is_transposed: bool, groups: int) -> Tensor:
    """Multiply output channels: the first axis, or (in, out / groups, ...) of a transposed one."""
    if not is_transposed:
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    apart = weight.view(groups, -1, *weight.shape[1:])
    each = scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
    return (apart * each).view(weight.shape)


def _doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _results_of(network: nn.Module, names: Collection[str], *inputs: Any) -> Results:
    """What a network returns, and what its modules of these names return in each call."""
    seen: Results = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[f"output of {name}, {len(seen)}"] = output.clone()  # may be written to later

        return hook

    with ExitStack() as stack:
        for name in names:
            handle = network.get_submodule(name).register_forward_hook(note(name))
            stack.callback(handle.remove)
        return outputs_of(network, *inputs) | seen


def outputs_of(network: nn.Module, *inputs: Any) -> Results:
    """The floating-point tensors that a network returns, by name."""
    with torch.no_grad():
        found = floating_tensors(network(*inputs))
    if not found:
        raise ValueError(f"{type(network).__name__} returns no floating-point tensor to compare")
    return {f"output {index}": x.detach().clone() for index, x in enumerate(found)}
