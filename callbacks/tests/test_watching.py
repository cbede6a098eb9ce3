"""Watching leaves no trace, and odd inputs, outputs and modes do not hide a fusion."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scale_equalization import ScaleEqualizationError, equalize_, find_fusions, measure_scales
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks


class Net(nn.Module):
    """Norms, dropout, random numbers and state of every kind; `fuse` joins two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.noise = nn.Sequential(nn.Dropout(0.5), nn.RReLU(), nn.Dropout2d(0.5))
        self.fuse = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.register_buffer("calls", torch.zeros(()))
        self.fail = False

    def levels(self, x: Tensor) -> Tensor:
        fine = self.encoder(x)
        return torch.cat([fine, F.interpolate(self.pool(fine), x.shape[2:])], 1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        norm = self.encoder[1]
        norm.num_batches_tracked = norm.num_batches_tracked + 1  # becomes another tensor
        random.random(), np.random.rand(), torch.rand(1)
        both = self.levels(x)
        if self.fail:
            raise ValueError("broken forward pass")
        return self.noise(self.fuse(both))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


def names(model: nn.Module, *inputs, **options) -> list[str]:
    return [fusion.name for fusion in find_fusions(model, *inputs, **options)]


def world(net: nn.Module) -> dict:
    """Everything that a forward pass could change."""
    hooks = {
        k: dict(v)
        for k, v in vars(module_hooks).items()
        if k.startswith("_global") and isinstance(v, dict)
    }
    return {
        "tensors": {
            k: (id(v), v.detach().clone()) for k, v in net.state_dict(keep_vars=True).items()
        },
        "gradients": [p.grad for p in net.parameters()],
        "flags": [m.training for m in net.modules()],
        "hooks": [
            hooks,
            [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()],
        ],
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state(),
        "modes": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
        ),
        "overrides": len(torch.overrides._get_current_function_mode_stack()),
        "attributes": [sorted(vars(m)) for m in net.modules()],
    }


def assert_same(before: dict, after: dict) -> None:
    for name, (identity, value) in before.pop("tensors").items():
        now, bits = after["tensors"][name]
        assert torch.equal(value, bits), name
        assert identity == now, f"{name} is another tensor now"
    assert torch.equal(before.pop("torch"), after["torch"])
    assert before == {key: after[key] for key in before}


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_is_changed(net, x, fail, gradients):
    net.encoder.eval()
    net.fuse[1].eval()
    net.encoder[0].requires_grad_(False)
    net.fail = fail
    with torch.set_grad_enabled(gradients):
        before = world(net)
        if fail:
            with pytest.raises(ValueError, match="broken forward pass"):
                find_fusions(net, x)
        else:
            assert names(net, x) == ["fuse.0"]
        assert_same(before, world(net))


def test_the_input_is_not_changed(net, x):
    before = x.clone()
    find_fusions(net, x)
    assert torch.equal(x, before)


def test_findings_do_not_depend_on_modes_or_flags(net, x):
    found = find_fusions(net, x)
    assert find_fusions(net.eval(), x) == found
    with torch.inference_mode():
        assert find_fusions(net, x) == found
    with torch.autocast("cpu", torch.bfloat16):
        assert find_fusions(net, x) == found
    assert find_fusions(net.double(), x.double()) == found
    assert find_fusions(net.to("meta"), x.double().to("meta")) == found


def test_batch_of_one_with_pooled_norms_is_watched(net, x):
    net.train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(x[:1])
    assert names(net, x[:1]) == ["fuse.0"]


def test_custom_autograd_functions_are_looked_through(x):
    class Join(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b], 1)

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.fuse(Join.apply(x.clone().requires_grad_(), x.flip(3)))

    assert names(Custom(), x) == ["fuse"]


def test_parts_in_inference_mode_are_followed(net, x):
    class Frozen(Net):
        def levels(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                return super().levels(x)

    assert names(Frozen(), x) == ["fuse.0"]
    assert len(equalize_(Frozen(), [x]).rows) == 2


def test_lazy_modules_are_refused_before_they_are_initialized(x):
    net = nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ScaleEqualizationError, match=r"0\.weight is not initialized yet.*run one"):
        find_fusions(net, x)
    assert isinstance(net[0].weight, nn.UninitializedParameter)


@dataclasses.dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize("wrap", [lambda y: {"out": y}, lambda y: (y, None), Output, lambda y: [y]])
def test_any_kind_of_output_will_do(x, wrap):
    class Wrapped(Net):
        def forward(self, x: Tensor):
            return wrap(super().forward(x))

    assert names(Wrapped(), x) == ["fuse.0"]


def test_inputs_by_name_and_in_containers_will_do(net, x):
    class Named(Net):
        def forward(self, *, batch: dict[str, Tensor], flip: bool = False) -> Tensor:
            return super().forward(batch["image"].flip(3) if flip else batch["image"])

    assert names(Named(), batch={"image": x}, flip=True) == ["fuse.0"]


def test_branches_taken_by_the_data_are_those_of_the_data_given(x):
    class Choosy(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.mean() > 0:
                return self.fuse(self.levels(x))
            return self.pool(self.encoder(x))

    assert names(Choosy(), x.abs()) == ["fuse.0"]
    with pytest.raises(ScaleEqualizationError, match="Check include/exclude"):
        find_fusions(Choosy(), -x.abs())


class Tagged(Tensor):
    """A subclass that stays itself through every operation."""


def test_tensor_subclasses_are_followed(net, x):
    assert names(net, x.as_subclass(Tagged)) == ["fuse.0"]
    assert len(equalize_(net, [x.as_subclass(Tagged)]).rows) == 2


def test_batches_may_be_made_in_the_pass(net):
    for make in (torch.zeros, torch.randn):
        report = measure_scales(
            net, range(2), forward=lambda net, _, make=make: net(make(2, 3, 8, 8))
        )
        assert [fusion.name for fusion in report.fusions] == ["fuse.0"]


def test_two_networks_in_one_pass_are_kept_apart(x):
    teacher, student = Net(), Net()

    def both(net: nn.Module, batch: Tensor) -> Tensor:
        return teacher(batch) + net(batch)

    before = teacher.fuse[0].weight.clone()
    report = equalize_(student, [x], forward=both)
    assert [fusion.name for fusion in report.fusions] == ["fuse.0"]
    assert torch.equal(teacher.fuse[0].weight, before)


def test_maps_are_freed_while_watching(x):
    """A deep network must not keep every map alive because it is watched."""
    import weakref

    kept: list[weakref.ref] = []

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                both = torch.cat([x * 1, x * 2], 1)
                kept.append(weakref.ref(both))
                x = F.relu(self.fuse(both))
                del both
                assert sum(ref() is not None for ref in kept) == 0
            return x

    assert names(Deep(), x) == ["fuse"]
