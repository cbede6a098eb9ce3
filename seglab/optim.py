"""Learning-rate schedule and parameter groups, as MMSegmentation's recipes really run them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Group = dict[str, Any]
ParameterRules = Callable[[nn.Module, float, float], list[Group]]
"""(module, base learning rate, base weight decay) -> parameter groups with both set."""


class WarmupPolyLR(LRScheduler):
    """Linear warm-up, then polynomial decay that ends at exactly `eta_min`; one step an iteration.

    With t = 0, 1, ... the iteration, w warm-up steps and T steps in all (mmengine
    `param_scheduler.py`, LinearLR followed by PolyLR):

    - t < w: lr = base * (s + (1 - s) * t / (w - 1)), s = `warmup_start`;
    - t >= w: lr = (base - eta_min) * (1 - (t - w) / (T - w - 1)) ** power + eta_min.

    Both are closed forms of t, so a resumed run has the rates of an uninterrupted one. Each
    parameter group has its own base rate.

    Args:
        optimizer: whose groups' rates are set.
        total_steps: T; None is to be replaced before the warm-up ends (the task does so).
        warmup_steps: w; 0 starts at the base rate.
        warmup_start: s, fraction of the base rate at t = 0.
        power: 1.0 is a straight line.
        eta_min: rate of the last iteration, t = T - 1, and of any after it.
        last_epoch: t - 1 at construction, as in torch.

    Raises:
        ValueError: no room for the warm-up.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> scheduler = WarmupPolyLR(optimizer, total_steps=6, warmup_steps=3, warmup_start=0.5)
    >>> rates = []
    >>> for _ in range(6):
    ...     rates.append(scheduler.get_last_lr()[0])
    ...     optimizer.step(); scheduler.step()
    >>> rates
    [0.5, 0.75, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        warmup_start: float = 1e-6,
        power: float = 1.0,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if total_steps is not None and total_steps <= warmup_steps:
            raise ValueError(
                f"total_steps={total_steps} leaves nothing after warmup_steps={warmup_steps}: "
                "train longer or warm up shorter"
            )
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.warmup_start = warmup_start
        self.power = power
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return each group's rate at iteration `last_epoch`."""
        step = self.last_epoch
        if step < self.warmup_steps:
            progress = step / max(1, self.warmup_steps - 1)
            factor = self.warmup_start + (1 - self.warmup_start) * progress
            return [base * factor for base in self.base_lrs]
        factor = self._decay(step - self.warmup_steps)
        return [(base - self.eta_min) * factor + self.eta_min for base in self.base_lrs]

    def set_end(self, total_steps: int) -> None:
        """End after `total_steps`; the rate of the coming iteration is that of the new schedule.

        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> scheduler = WarmupPolyLR(optimizer, total_steps=3)
        >>> optimizer.step(); scheduler.step(); scheduler.set_end(5); scheduler.get_last_lr()
        [0.75]
        """
        self.total_steps = total_steps
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates

    def _decay(self, step: int) -> float:
        if step == 0:
            return 1.0
        if self.total_steps is None:
            raise ValueError("WarmupPolyLR does not know when to end: set total_steps")
        last = max(1, self.total_steps - self.warmup_steps - 1)
        return float(max(0.0, 1 - step / last) ** self.power)


class NoDecay:
    """No weight decay for parameters whose *full* name contains one of `patterns`.

    This is mmengine's substring rule (`default_constructor.py`) with its consequence: in the Swin
    recipe (`norm`, `relative_position_bias_table`) the heads' batch norms, called `bn`, and all
    biases of linear layers do decay. In the Twins recipe the pattern `pos_block` matches nothing in
    MMSegmentation, so its positional convolutions decay; in timm it would match: leave it out.

    Args:
        patterns: substrings of full parameter names.

    Raises:
        ValueError: at the call, for a pattern that no name contains.

    >>> module = nn.ModuleDict({"norm": nn.LayerNorm(2), "proj": nn.Linear(2, 2)})
    >>> groups = NoDecay(["norm"])(module, 0.1, 0.01)
    >>> [(group["name"], group["weight_decay"], len(group["params"])) for group in groups]
    [('no_decay', 0.0, 2), ('decay', 0.01, 2)]
    """

    def __init__(self, patterns: Sequence[str] = ("norm",)) -> None:
        self.patterns = tuple(patterns)

    def __call__(self, module: nn.Module, base_lr: float, base_weight_decay: float) -> list[Group]:
        """Return one group with and one without weight decay, at the same learning rate."""
        names = [name for name, _ in module.named_parameters()]
        for pattern in self.patterns:
            if not any(pattern in name for name in names):
                raise ValueError(
                    f"no parameter's name contains {pattern!r}; names look like {names[:3]}"
                )
        return group_by(
            module,
            lambda name, _: no_decay_if(any(p in name for p in self.patterns)),
            base_lr,
            base_weight_decay,
        )


class StageDecay:
    """ConvNeXt's learning rate by stage, and no weight decay for vectors and biases.

    MMSegmentation's `layer_decay_optimizer_constructor.py` with decay_type stage_wise: a parameter
    of id i learns at base * rate ** (n_layers + 1 - i), where i is 0 for the stem and all
    downsampling layers, 1..4 for the stages, and n_layers + 1 for everything else: both heads and
    the norms on the encoder's outputs.

    Args:
        rate: ratio between neighbouring ids.
        n_layers: 6 for ConvNeXt-T, 12 for S and B.

    Raises:
        ValueError: at the call, for a network without ConvNeXt's stem and stages.

    >>> from seglab.models import TimmEncoder
    >>> network = nn.ModuleDict({"encoder": TimmEncoder("convnext_atto")})
    >>> sorted({round(group["lr"], 4) for group in StageDecay(0.9, 6)(network, 1.0, 0.05)})
    [0.4783, 0.5314, 0.5905, 0.6561, 0.729, 1.0]
    """

    def __init__(self, rate: float = 0.9, n_layers: int = 12) -> None:
        self.rate = rate
        self.n_layers = n_layers

    def __call__(self, module: nn.Module, base_lr: float, base_weight_decay: float) -> list[Group]:
        """Return one group for each pair of stage and decay."""
        names = [name for name, _ in module.named_parameters()]
        stages = {_convnext_stage(name) for name in names}
        if not {"stem", "stage0", "stage3"} <= stages:
            raise ValueError(
                "StageDecay is for ConvNeXt encoders (parameters `encoder.model.stem.*` and "
                f"`encoder.model.stages.0.*`); this network's names look like {names[:3]}"
            )
        return group_by(
            module,
            lambda name, p: (
                f"{_convnext_stage(name)}_{no_decay_if(p.ndim == 1 or name.endswith('.bias'))}"
            ),
            base_lr,
            base_weight_decay,
            self._scale,
        )

    def _scale(self, group: str) -> float:
        stage = group.partition("_")[0]
        ids = {"stem": 0, "stage0": 1, "stage1": 2, "stage2": 3, "stage3": 4}
        return float(self.rate ** (self.n_layers + 1 - ids.get(stage, self.n_layers + 1)))


def build_optimizer(
    module: nn.Module,
    factory: Callable[[Iterable[Any]], Optimizer],
    rules: ParameterRules | None = None,
) -> Optimizer:
    """Build an optimizer over the trainable parameters, grouped by `rules` where given.

    The base learning rate and weight decay are those of the factory itself, so no config names
    them twice. Adam and AdamW take their fused step, the same update in one pass over the
    weights, unless the factory sets `fused` or `foreach`.

    >>> from functools import partial
    >>> module = nn.ModuleDict({"norm": nn.LayerNorm(2), "proj": nn.Linear(2, 2)})
    >>> adamw = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01)
    >>> optimizer = build_optimizer(module, adamw, NoDecay(["norm"]))
    >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    [(0.1, 0.0), (0.1, 0.01)]
    """
    if rules is None:
        return _with_fused_step(factory([p for p in module.parameters() if p.requires_grad]))
    defaults = factory([nn.Parameter(torch.zeros(1))]).defaults
    groups = rules(module, defaults["lr"], defaults.get("weight_decay", 0.0))
    return _with_fused_step(factory(groups))


def _with_fused_step(optimizer: Optimizer) -> Optimizer:
    # SGD's refuses parameters that get their first gradient later than others, Adagrad's is for the
    # CPU only.
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return optimizer
    for group in optimizer.param_groups:
        undecided = group["fused"] is None and group["foreach"] is None
        if undecided and not group["differentiable"] and all(map(_can_be_fused, group["params"])):
            # Not by the constructor: then the optimizer would unscale gradients itself, and
            # Lightning refuse to clip them under 16-mixed.
            group["fused"] = True
    optimizer.register_step_pre_hook(_match_layout_before)
    return optimizer


def _can_be_fused(p: torch.Tensor) -> bool:
    on_known_device = p.is_floating_point() and p.device.type in ("cpu", "cuda")
    return on_known_device and torch.empty_like(p).stride() == p.stride()  # no gaps in memory


def _match_layout_before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """Match layouts once the gradients of this step are there, which a closure may make."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        match_layout_(optimizer)
        return None

    def closure_and_match() -> Any:
        loss = closure()
        match_layout_(optimizer)
        return loss

    return (args[0], closure_and_match), {k: v for k, v in kwargs.items() if k != "closure"}


@torch.no_grad()
def match_layout_(optimizer: Optimizer) -> None:
    """Give gradients and state the layout of their weights, which fused steps take for granted.

    A checkpoint's state comes in the layout it was saved in, channels-last perhaps; a gradient that
    somebody has set or accumulated comes in any. The fused step on the CPU would not notice.

    >>> weight = nn.Parameter(torch.zeros(2, 3, 4, 4))
    >>> optimizer = torch.optim.SGD([weight], momentum=0.9)
    >>> momentum = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    >>> optimizer.state[weight]["momentum_buffer"] = momentum
    >>> match_layout_(optimizer)
    >>> optimizer.state[weight]["momentum_buffer"].is_contiguous()
    True
    """
    for weight in (p for group in optimizer.param_groups for p in group["params"]):
        if weight.grad is not None:
            weight.grad = _laid_out_as(weight, weight.grad)
        state = optimizer.state.get(weight, {})
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                state[name] = _laid_out_as(weight, value)


def _laid_out_as(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if value.layout != torch.strided or value.stride() == weight.stride():
        return value
    return torch.empty_like(weight, dtype=value.dtype).copy_(value)


def no_decay_if(condition: bool) -> str:
    """End of a group's name: what ends in `no_decay` has no weight decay."""
    return "no_decay" if condition else "decay"


def _convnext_stage(name: str) -> str:
    """`stem` (downsampling layers too), `stage0`..`stage3`, or `rest`."""
    found = re.search(r"(?:^|\.)encoder\.model\.(stem|stages\.(\d)\.(downsample)?)", name)
    if found is None:
        return "rest"
    return "stem" if found[2] is None or found[3] else f"stage{found[2]}"


def group_by(
    module: nn.Module,
    name_group: Callable[[str, nn.Parameter], str],
    base_lr: float,
    base_weight_decay: float,
    scale: Callable[[str], float] = lambda group: 1.0,
) -> list[Group]:
    """Put the trainable parameters into groups by a name that a function gives each."""
    groups: dict[str, Group] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name_group(name, parameter)
        if key not in groups:
            weight_decay = 0.0 if key.endswith("no_decay") else base_weight_decay
            rate = base_lr * scale(key)
            groups[key] = {"params": [], "lr": rate, "weight_decay": weight_decay, "name": key}
        groups[key]["params"].append(parameter)
    return list(groups.values())
