"""Parameter groups that give a folded network the training dynamics of the explicit equalizer.

With V the explicit weight and W = V * scale the folded one, sum(delta) = 0 behind a normalization
makes the gradients related by g_V = scale * g_W. An optimizer step on V moves W by scale times as
much. Per branch that is a matter of learning rate, weight decay and epsilon; the factors, with
scale = 1 / s, are those of the table below. Since branches share one weight tensor and optimizers
work on whole tensors, each slice becomes a parameter of its own that views the weight's memory.
Its gradient is a view too: of the weight's gradient as it is when the optimizer looks, that is
after the all-reduce of DistributedDataParallel, accumulation, unscaling and clipping.
Such a view has gaps in memory, which PyTorch's fused kernels would write into: the groups of slices
say ``fused=False``, and a fused kernel that is given a slice all the same is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .fusion import Fusion, ScaleEqualizationError, UnsupportedFusionError
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

    Exact for SGD (with momentum, dampening, Nesterov), Adam and AdamW, if a normalization over the
    batch follows each fusion or the measured branches are centred. Clipping by the global norm,
    LARS and LAMB break the equivalence, and so do fused kernels other than PyTorch's (apex,
    bitsandbytes), which take a slice for dense memory.

    Schedules that multiply (LambdaLR, StepLR, MultiStepLR, LinearLR, PolynomialLR; without a floor
    CosineAnnealingLR and ReduceLROnPlateau) keep the ratios of the groups. Those that are given
    rates do not, unless there is one for each group: ``OneCycleLR(max_lr=[...])``, ``CyclicLR``,
    ``ReduceLROnPlateau(min_lr=[...])``, the rate of everything else times ``group["lr_factor"]``;
    for ``CosineAnnealingLR(eta_min=...)`` and its relatives take a LambdaLR. `require_lr_ratios`
    checks it; in a Trainer `ScaleEqualizationCallback` and `ScaleMonitor` call it before each step.

    Args:
        model: The folded network.
        report: What `fold_` returned.
        optimizer: The family of the update rule.
        lr: Learning rate of everything else.
        weight_decay: Of everything else.
        eps: Of everything else (Adam and AdamW).

    Returns:
        First the group of all other parameters, then one for each branch, whose one parameter is
        a view of its slice, with the ratio of its learning rate as ``lr_factor``. Make them when
        the model is on its device; use ``optimizer.zero_grad()`` as ever. Slices are never updated
        by a fused kernel, whatever the optimizer is told (under a GradScaler tell it fused=False).

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
            group = {"params": [values], "lr": lr * factors[0], "lr_factor": factors[0]}
            group |= {"weight_decay": weight_decay * factors[1], "fused": False}
            groups.append(_with_eps(group, optimizer, eps * factors[2]))
    others = [p for p in model.parameters() if id(p) not in fused]
    rest = {"params": others, "lr": lr, "lr_factor": 1.0, "weight_decay": weight_decay}
    return [_with_eps(rest, optimizer, eps), *groups]


def require_lr_ratios(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that a schedule has kept the ratios of the learning rates of such groups.

    Args:
        param_groups: Of an optimizer; those without an ``lr_factor`` are passed over.

    Raises:
        ScaleEqualizationError: A learning rate is not that of the first group times its factor.
    """
    if not any(isinstance(p, _Slice) for group in param_groups for p in group["params"]):
        return
    groups = [group for group in param_groups if "lr_factor" in group]
    base = float(groups[0]["lr"]) / groups[0]["lr_factor"]
    for index, group in enumerate(groups):
        rate, needed = float(group["lr"]), base * group["lr_factor"]
        floor = 1e-9 * float(group.get("initial_lr", 0.0))  # a cosine that ends at zero
        if abs(rate - needed) > 1e-3 * max(abs(rate), abs(needed)) + floor:
            raise ScaleEqualizationError(
                f"parameter group {index} has learning rate {rate:.3g}, but needs {needed:.3g} "
                f"({group['lr_factor']:.3g} times that of the others): a schedule given rates "
                "(max_lr, eta_min, min_lr) undoes the ratios of equivalent_param_groups; give it "
                'a list, each times group["lr_factor"], or take a LambdaLR'
            )


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
        yield _Slice.of(weight, (_dim(fusion), branch.start, branch.width))


class _Slice(nn.Parameter):
    """A branch's slice of a weight: shares its memory, and its gradient whenever that is asked for.

    Nothing is copied and no hook runs, so whatever is done to the weight's gradient, by the
    all-reduce between ranks as by a gradient scaler, is done to the slices', and vice versa.
    """

    whole: nn.Parameter
    place: tuple[int, int, int]

    @classmethod
    def of(cls, weight: nn.Parameter, place: tuple[int, int, int]) -> _Slice:
        made = cls(weight.detach().narrow(*place), requires_grad=weight.requires_grad)
        made.whole, made.place = weight, place
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "").startswith("_fused_"):
            raise ScaleEqualizationError(
                "a fused optimizer kernel takes a slice of a weight for dense memory and would "
                "write into other branches: keep fused=False in the groups of "
                "equivalent_param_groups (an optimizer state saved with fused=True sets it)"
            )
        return torch._C._disabled_torch_function_impl(func, types, args, dict(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slice:
        """A slice of the weight's copy, which is the copied model's if that is copied along."""
        made = memo[id(self)] = _Slice.of(copy.deepcopy(self.whole, memo), self.place)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _Slice.of, (self.whole, self.place)

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
