"""Parameter groups of a folded network against the explicit equalizer, trained in float64."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from scale_equalization import (
    ScaleEqualizationError,
    UnsupportedFusionError,
    equalize_,
    equivalent_param_groups,
)
from scale_equalization.equivalence import require_lr_ratios
from torch import nn

STDS = (0.25, 3.0)


class Net(nn.Module):
    """Two inputs fused; `divide` makes it the explicit form of itself."""

    def __init__(self, divide: tuple[float, ...] = (1.0, 1.0)) -> None:
        super().__init__()
        self.divide = divide
        self.fuse = nn.Conv2d(5, 4, 3, padding=1)
        self.classify = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        branches = (x[:, :2] * STDS[0], x[:, 2:] * STDS[1])
        scaled = [branch / std for branch, std in zip(branches, self.divide, strict=True)]
        return self.classify(self.fuse(torch.cat(scaled, 1)).tanh())


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 5, 8, 8, generator=generator, dtype=torch.float64)


def loss(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(network(x), (x.sum(1) > 0).long())


@pytest.fixture
def pair():
    """A folded network, its report, and the explicit network."""
    torch.manual_seed(0)
    folded = Net().double()
    state = {k: v.clone() for k, v in folded.state_dict().items()}
    report = equalize_(folded, [batch(-i) for i in range(1, 9)])
    explicit = Net(tuple(row["std"] for row in report.rows)).double()
    explicit.load_state_dict(state)
    return folded, report, explicit


RULES = [
    (torch.optim.SGD, "sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.SGD, "sgd", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    (torch.optim.Adam, "adam", {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-3}),
    (torch.optim.AdamW, "adamw", {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-3}),
    (torch.optim.SGD, "sgd", {"lr": 0.05, "momentum": 0.9, "fused": True}),
    (torch.optim.Adam, "adam", {"lr": 0.01, "eps": 1e-3, "fused": True}),
    (torch.optim.AdamW, "adamw", {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-3, "fused": True}),
    (torch.optim.AdamW, "adamw", {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-3, "foreach": True}),
]


def groups_for(network, report, name, options):
    known = {k: v for k, v in options.items() if k in ("lr", "weight_decay", "eps")}
    return equivalent_param_groups(network, report, name, **known)


def difference(a: nn.Module, b: nn.Module) -> float:
    return float((a(batch(99)) - b(batch(99))).detach().abs().max())


@pytest.mark.parametrize(("rule", "name", "options"), RULES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_groups_train_as_the_explicit_network(pair, rule, name, options, accumulate):
    folded, report, explicit = pair
    ours = rule(groups_for(folded, report, name, options), **options)
    theirs = rule(explicit.parameters(), **options)
    for step in range(20):
        for network, optimizer in ((folded, ours), (explicit, theirs)):
            for micro in range(accumulate):
                (loss(network, batch(step * 7 + micro)) / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert difference(folded, explicit) < 1e-12
    untrained = Net(explicit.divide).double()
    assert difference(untrained, explicit) > 1e-2  # or else nothing was trained


@pytest.mark.parametrize("to_none", [True, False])
def test_discarded_gradients_leave_nothing_behind(pair, to_none):
    folded, report, explicit = pair
    ours = torch.optim.SGD(groups_for(folded, report, "sgd", {"lr": 0.1}), lr=0.1)
    theirs = torch.optim.SGD(explicit.parameters(), lr=0.1)
    for network, optimizer in ((folded, ours), (explicit, theirs)):
        (loss(network, batch(0)) * float("inf")).backward()  # a step that a scaler skips
        optimizer.zero_grad(set_to_none=to_none)
        loss(network, batch(1)).backward()
        optimizer.step()
    assert difference(folded, explicit) < 1e-12


def test_unscaling_and_clipping_reach_the_slices(pair):
    folded, report, _ = pair
    groups = groups_for(folded, report, "sgd", {"lr": 0.1})
    loss(folded, batch(0)).backward()
    expected = folded.fuse.weight.grad[:, 2:].clone()
    for parameter in folded.parameters():
        parameter.grad.div_(8)
    assert torch.equal(groups[2]["params"][0].grad, expected / 8)
    groups[2]["params"][0].grad.mul_(16)
    assert torch.equal(folded.fuse.weight.grad[:, 2:], expected * 2)


def test_model_moved_after_its_groups_is_refused(pair):
    folded, report, _ = pair
    optimizer = torch.optim.SGD(groups_for(folded, report, "sgd", {"lr": 0.1}), lr=0.1)
    folded.float()
    loss(folded.double(), batch(0)).backward()
    with pytest.raises(ScaleEqualizationError, match="moved after its parameter groups"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["off", "reparametrize"])
def test_groups_for_an_unfolded_network_are_refused(mode):
    network = Net().double()
    report = equalize_(network, [batch(0)], mode=mode)
    with pytest.raises(UnsupportedFusionError, match=f'mode="{mode}"'):
        equivalent_param_groups(network, report, "sgd", lr=0.1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_kernel_on_slices_is_refused(pair, kind):
    folded, report, _ = pair
    groups = groups_for(folded, report, kind.__name__.lower(), {"lr": 0.1})
    optimizer = kind(groups, lr=0.1)
    for group in optimizer.param_groups:  # as an optimizer's saved state does
        group["fused"] = True
    loss(folded, batch(0)).backward()
    with pytest.raises(ScaleEqualizationError, match="fused"):
        optimizer.step()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


@pytest.mark.parametrize("way", COPIES)
def test_copied_model_and_optimizer_train_on_alike(pair, way):
    folded, report, _ = pair
    ours = torch.optim.SGD(groups_for(folded, report, "sgd", {"lr": 0.1}), lr=0.1, momentum=0.9)
    both = COPIES[way]((folded, ours))
    for network, optimizer in ((folded, ours), both):
        loss(network, batch(0)).backward()
        optimizer.step()
    assert difference(folded, both[0]) == 0.0
    assert both[0].fuse.weight.data_ptr() != folded.fuse.weight.data_ptr()
    moved = (both[0].fuse.weight - folded.fuse.weight).abs().max()
    assert moved == 0.0
    assert both[0].fuse.weight.grad is not None


S = torch.optim.lr_scheduler
KEEP = {
    "StepLR": lambda o: S.StepLR(o, 2),
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: (1 - step / 9) ** 0.9),
    "cosine": lambda o: S.CosineAnnealingLR(o, 9),
    "list of max_lr": lambda o: S.OneCycleLR(
        o, max_lr=[0.01 * group["lr_factor"] for group in o.param_groups], total_steps=10
    ),
}
UNDO = {
    "max_lr": lambda o: S.OneCycleLR(o, max_lr=0.01, total_steps=10),
    "eta_min": lambda o: S.CosineAnnealingLR(o, 9, eta_min=1e-4),
}


@pytest.mark.parametrize("schedule", [*KEEP, *UNDO])
def test_schedules_that_undo_the_ratios_are_refused(pair, schedule):
    folded, report, _ = pair
    optimizer = torch.optim.SGD(groups_for(folded, report, "sgd", {"lr": 0.1}), lr=0.1)
    scheduler = {**KEEP, **UNDO}[schedule](optimizer)

    def steps():
        for _ in range(9):
            require_lr_ratios(optimizer.param_groups)
            optimizer.step()
            scheduler.step()
        require_lr_ratios(optimizer.param_groups)

    undone = pytest.raises(ScaleEqualizationError, match="lr_factor")
    with nullcontext() if schedule in KEEP else undone:
        steps()
