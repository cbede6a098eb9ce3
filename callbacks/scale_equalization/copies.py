"""Copies of a network's weights that somebody keeps: mean teachers, moving averages.

They were made before the weights were equalized, and go on with the old values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .fusion import Fusion
from .layers import layer_of
from .patterns import clean_name
from .reachable import attributes

Copies = dict[str, list[tuple[str, Tensor]]]


def find_copies(model: nn.Module, callbacks: Iterable[object] = ()) -> Copies:
    """For each weight of the model, the names of other tensors with the very same values.

    Args:
        model: Its own parameters and buffers are looked at, too.
        callbacks: Modules and mappings of tensors in their attributes are looked at.
    """
    groups: dict[tuple[object, ...], list[tuple[str, Tensor]]] = {}
    storages = set()
    for name, tensor in _tensors(model, callbacks):
        if tensor.dim() < 2 or tensor.data_ptr() in storages or not tensor.is_floating_point():
            continue
        storages.add(tensor.data_ptr())
        values = tensor.detach()
        key = (tuple(values.shape), float(values.double().sum()), float(values.double().norm()))
        groups.setdefault(key, []).append((name, values))
    own = {clean_name(name) for name, _ in model.named_parameters()}
    return {
        name: [(other, tensor) for other, tensor in group if other != name]
        for group in groups.values()
        for name, values in group
        if name in own and len(group) > 1 and not bool((values == values.flatten()[0]).all())
    }


def stale_copies(
    model: nn.Module,
    fusions: Iterable[Fusion],
    copies: Copies,
    refreshed: Collection[int] = (),
) -> Iterator[str]:
    """One sentence for each copy whose weight has since been changed without it.

    `refreshed` are the addresses of copies that were made again: a reparametrized one holds V,
    which is what the weight was.
    """
    changed = {f"{fusion.name}.{fusion.parameter}": fusion for fusion in fusions}
    for name in sorted(changed.keys() & copies.keys()):
        fusion = changed[name]
        weight: Tensor = getattr(layer_of(model, fusion), fusion.parameter)
        for other, tensor in copies[name]:
            if other in changed or tensor.data_ptr() in refreshed:
                continue
            if torch.equal(tensor, weight.detach().to(tensor.device)):
                continue
            yield (
                f"{other} is a copy of {name} and keeps the old values: copy the network again "
                "(with a Trainer, in on_train_start), or fold_(copy, report)"
            )


def _tensors(model: nn.Module, callbacks: Iterable[object]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield clean_name(name), tensor
    inside = {id(module) for module in model.modules()}
    for callback in callbacks:
        for attribute, value in attributes(callback).items():
            place = f"{type(callback).__name__}.{attribute}"
            if isinstance(value, nn.Module) and id(value) not in inside:
                yield from ((f"{place}.{name}", p) for name, p in value.named_parameters())
            elif isinstance(value, Mapping):
                pairs = value.items()
                yield from ((f"{place}[{k!r}]", v) for k, v in pairs if isinstance(v, Tensor))
