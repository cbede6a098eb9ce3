"""Parameter groups that give a folded network the training dynamics of the explicit equalizer.

With V the explicit weight and W = V * scale the folded one, sum(delta) = 0 behind a normalization
makes the gradients related by g_V = scale * g_W. An optimizer step on V moves W by scale times as
much. Per branch that is a matter of learning rate, weight decay and epsilon; the factors, with
scale = 1 / s, are those of the table below. Since branches share one weight tensor and optimizers
work on whole tensors, each slice becomes a parameter of its own that views the weight's memory.
Its gradient is a view too: of the weight's gradient as it is when the optimizer looks, that is
after the all-reduce of DistributedDataParallel, accumulation, unscaling and clipping.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn

from .fusion import Branch, Fusion, ScaleEqualizationError, UnsupportedFusionError
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
        a view of its slice. Make them when the model is on its device; use
        ``optimizer.zero_grad()`` as ever.

    Raises:
        UnsupportedFusionError: A grouped convolution, whose slices are not one block, or a
            report that was not folded.

    >>> net = nn.Sequential(nn.Conv2d(2, 1, 1))
    >>> len(equivalent_param_groups(net, Report((), ()), "sgd", lr=0.1))
    1
    """
    model = unwrap(model)
    if report.fusions and report.mode != "fold":
        raise UnsupportedFusionError(
            f'the report has mode="{report.mode}": these groups are for a folded network only'
        )
    powers = _POWERS[optimizer]
    groups: list[dict[str, Any]] = []
    fused = set()
    for fusion in report.fusions:
        weight = model.get_submodule(fusion.name).get_parameter(fusion.parameter)
        fused.add(id(weight))
        for values, scale in zip(_slices(weight, fusion), report.scales(fusion), strict=True):
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
        yield _Slice.of(weight, _dim(fusion), branch)


class _Slice(nn.Parameter):
    """A branch's slice of a weight: shares its memory, and its gradient whenever that is asked for.

    Nothing is copied and no hook runs, so whatever is done to the weight's gradient, by the
    all-reduce between ranks as by a gradient scaler, is done to the slices', and vice versa.
    """

    whole: nn.Parameter
    place: tuple[int, int, int]

    @classmethod
    def of(cls, weight: nn.Parameter, dim: int, branch: Branch) -> _Slice:
        place = (dim, branch.start, branch.width)
        made = cls(weight.detach().narrow(*place), requires_grad=weight.requires_grad)
        made.whole, made.place = weight, place
        return made

    @property
    def grad(self) -> Tensor | None:
        whole = self.whole
        if whole.untyped_storage().data_ptr() != self.untyped_storage().data_ptr():
            raise ScaleEqualizationError(
                f"a weight of shape {tuple(whole.shape)} was moved after its parameter groups "
                "were made: call equivalent_param_groups when the model is on its device"
            )
        return None if whole.grad is None else whole.grad.narrow(*self.place)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is None:  # zero_grad of the optimizer, which holds every slice of the weight
            self.whole.grad = None
            return
        if self.whole.grad is None:
            self.whole.grad = self.whole.new_zeros(self.whole.shape)
        self.whole.grad.narrow(*self.place).copy_(value)
