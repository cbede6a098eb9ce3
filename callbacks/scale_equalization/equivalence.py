"""Parameter groups that give a folded network the training dynamics of the explicit equalizer.

With V the explicit weight and W = V * scale the folded one, sum(delta) = 0 behind a normalization
makes the gradients related by g_V = scale * g_W. An optimizer step on V moves W by scale times as
much. Per branch that is a matter of learning rate, weight decay and epsilon; the factors, with
scale = 1 / s, are those of the table below. Since branches share one weight tensor and optimizers
work on whole tensors, each slice becomes a parameter of its own that views the weight's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .fusion import Fusion, UnsupportedFusionError
from .layers import unwrap
from .report import Report

Rule = Literal["sgd", "adam", "adamw"]

# Powers of the scale (1 / s) that lr, weight decay and eps are multiplied by.
_POWERS: dict[str, tuple[int, int, int]] = {
    "sgd": (2, -2, 0),  # with or without momentum; decay as L2 in the gradient
    "adam": (1, -2, -1),  # decay as L2 in the gradient
    "adamw": (1, -1, -1),  # decoupled decay
}


def equivalent_param_groups(
    model: nn.Module,
    report: Report,
    optimizer: Rule,
    *,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
) -> list[dict[str, Any]]:
    """Groups for `optimizer` under which folding trains as the explicit equalizer would.

    Exact for SGD (with momentum, dampening, Nesterov), Adam and AdamW with any schedule, if a
    normalization over the batch follows each fusion or the measured branches are centred. Clipping
    by the global norm, LARS and LAMB break the equivalence.

    Args:
        model: The folded network.
        report: What `fold_` returned.
        optimizer: The family of the update rule.
        lr: Learning rate of everything else.
        weight_decay: Of everything else.
        eps: Of everything else (Adam and AdamW).

    Returns:
        First the group of all other parameters, then one for each branch, whose one parameter is
        a view of its slice. Gradients are handed over as they are accumulated; use
        ``optimizer.zero_grad()`` as ever.

    Raises:
        UnsupportedFusionError: A grouped convolution, whose slices are not one block.

    >>> net = nn.Sequential(nn.Conv2d(2, 1, 1))
    >>> len(equivalent_param_groups(net, Report((), ()), "sgd", lr=0.1))
    1
    """
    model = unwrap(model)
    powers = _POWERS[optimizer]
    groups: list[dict[str, Any]] = []
    fused = set()
    for fusion in report.fusions:
        weight = model.get_submodule(fusion.name).get_parameter(fusion.parameter)
        fused.add(id(weight))
        slices = list(_slices(weight, fusion))
        weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            _hand_over(fusion, slices)
        )
        for values, scale in zip(slices, report.scales(fusion), strict=True):
            factors = [scale**power for power in powers]
            group = {"params": [values], "lr": lr * factors[0]}
            group["weight_decay"] = weight_decay * factors[1]
            groups.append(_with_eps(group, optimizer, eps * factors[2]))
    others = [p for p in model.parameters() if id(p) not in fused]
    rest = {"params": others, "lr": lr, "weight_decay": weight_decay}
    return [_with_eps(rest, optimizer, eps), *groups]


def _with_eps(group: dict[str, Any], optimizer: Rule, eps: float) -> dict[str, Any]:
    return group if optimizer == "sgd" else {**group, "eps": eps}


def _dim(fusion: Fusion) -> int:
    if fusion.groups > 1 and not fusion.transposed:
        raise UnsupportedFusionError(
            f"{fusion.name} has {fusion.groups} groups: its branches are no blocks of the weight "
            'that could be parameters; use mode="reparametrize", which needs no groups'
        )
    return 0 if fusion.transposed else 1


def _slices(weight: nn.Parameter, fusion: Fusion) -> Iterator[nn.Parameter]:
    for branch in fusion.branches:
        values = weight.detach().narrow(_dim(fusion), branch.start, branch.width)
        yield nn.Parameter(values, requires_grad=weight.requires_grad)


def _hand_over(fusion: Fusion, slices: Sequence[nn.Parameter]) -> Callable[[Tensor], None]:
    """Move a freshly accumulated gradient from the weight to its slices."""
    widths = [branch.width for branch in fusion.branches]

    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        parts = torch.split(weight.grad, widths, _dim(fusion))
        for values, gradient in zip(slices, parts, strict=True):
            values.grad = gradient.clone() if values.grad is None else values.grad + gradient
        weight.grad = None

    return hook
