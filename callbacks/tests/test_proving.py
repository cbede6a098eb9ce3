"""All or nothing: what cannot be proved on the network is undone, and options are checked first."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from scale_equalization import (
    ScaleEqualizationError,
    UnsupportedFusionError,
    bake_,
    equalize_,
    find_fusions,
    measure_scales,
)
from torch import nn


class Net(nn.Module):
    """Two levels; `act` lies between the concatenation and the layer, `norm` behind it."""

    def __init__(self, act=lambda x: x, layer: nn.Module | None = None, norm=None) -> None:
        super().__init__()
        self.fuse = layer or nn.Conv2d(6, 4, 3, padding=1)
        self.norm = norm or nn.Identity()
        self.act = act

    def forward(self, x):
        return self.norm(self.fuse(self.act(torch.cat([x + 1.0, 20 * x.flip(3)], 1))))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)]


def unchanged(net: nn.Module, before: dict) -> bool:
    return all(torch.equal(values, before[key]) for key, values in net.state_dict().items())


class Later(nn.Module):
    """A nonlinearity that sets in when it has been called often enough."""

    calls = itertools.count(1)  # what cannot be set back between passes

    def forward(self, x):
        return x.tanh() if next(Later.calls) > 12 else x


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_a_nonlinearity_of_later_batches_is_refused(batches, mode):
    Later.calls = itertools.count(1)
    net = Net(Later())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedFusionError, match="fuse"):
        equalize_(net, batches * 4, tolerance=0, mode=mode)
    assert unchanged(net, before)
    assert type(net.fuse) is nn.Conv2d
    assert not hasattr(net.fuse, "_scale_equalized")


class Hidden(Net):
    """Holds its weight's memory a second time, as no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.fuse.weight.detach()]

    def forward(self, x):
        return super().forward(x) + self.hidden[0].sum()


def test_a_weight_used_out_of_sight_is_undone(batches):
    net = Hidden()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedFusionError, match="fuse"):
        equalize_(net, batches)
    assert unchanged(net, before)


CONFLICTS = [
    {"preserve_norm": True, "placebo": True},
    {"center": True, "placebo": True},
    {"sums": True, "mode": "reparametrize"},
    {"mode": "folded"},
    {"tolerance": -1.0},
    {"max_batches": 0},
]


@pytest.mark.parametrize("options", CONFLICTS, ids=str)
def test_conflicting_options_are_refused_before_a_batch_is_read(options):
    def batches():
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(ValueError, match=r"choose one|leave out|must be|use mode"):
        equalize_(Net(), batches(), **options)


def test_nan_batches_change_nothing_with_sums(batches):
    class Both(Net):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = super().forward(x)
            small = self.side(nn.functional.avg_pool2d(y, 2))
            return y + nn.functional.interpolate(small, scale_factor=2.0)

    net = Both()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ScaleEqualizationError, match="not finite"):
        equalize_(net, [*batches, batches[0] * float("nan")], sums=True, tolerance=0)
    assert unchanged(net, before)


CENTRED = {
    "ReLU between": (torch.relu, None),
    "zero padding between": (nn.ZeroPad2d(1), None),
    "strided transposed convolution": (lambda x: x, nn.ConvTranspose2d(6, 4, 2, stride=2)),
}


@pytest.mark.parametrize("case", CENTRED)
def test_means_that_no_bias_can_take_up_are_refused(case, batches):
    net = Net(*CENTRED[case])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UnsupportedFusionError, match="leave out center"):
        equalize_(net, batches, center=True)
    assert unchanged(net, before)


@pytest.mark.parametrize("option", ["preserve_norm", "placebo"])
def test_zero_weights_stay_zero(batches, option):
    net = Net()
    nn.init.zeros_(net.fuse.weight)
    equalize_(net, batches, **{option: True})
    assert torch.equal(net.fuse.weight, torch.zeros_like(net.fuse.weight))


def test_half_weights_that_would_overflow_are_refused(batches):
    class Tiny(Net):
        def forward(self, x):
            return self.fuse(torch.cat([x, x * 1e-6], 1).half()).float()

    net = Tiny()
    net.fuse.half()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ScaleEqualizationError, match=r"not finite in torch\.float16"):
        equalize_(net, batches)
    assert unchanged(net, before)


def test_factors_are_rounded_once(batches):
    net = Net()
    net.fuse.bfloat16()
    run = lambda net, x: net.fuse(torch.cat([x, 3 * x], 1).bfloat16())  # noqa: E731
    before = net.fuse.weight.detach().double()
    report = equalize_(net, batches, forward=run)
    for row in report.rows:
        part = slice(row["start"], row["stop"])
        expected = (before[:, part] * row["scale"]).bfloat16()
        assert torch.equal(net.fuse.weight[:, part], expected)


def test_very_small_branches_are_measured():
    net = Net()
    net.forward = lambda x: net.fuse(torch.cat([x, x * 1e-25], 1))
    batch = torch.randn(4, 3, 8, 8)
    small = measure_scales(net, [batch]).rows[1]
    assert small["std"] == pytest.approx(
        (batch * 1e-25).double().std(correction=0).item(), rel=1e-6
    )


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_loaded_equalized_weights_are_left_alone(batches, mode):
    net, fresh = Net(norm=nn.BatchNorm2d(4)), Net(norm=nn.BatchNorm2d(4))
    equalize_(net, batches, mode=mode)
    fresh.load_state_dict(net.state_dict(), strict=True)
    before = copy.deepcopy(fresh.state_dict())
    report = equalize_(fresh, batches)
    assert unchanged(fresh, before)
    assert "left alone: fuse: the slices of its weight are in proportion" in str(report)
    equalize_(fresh, batches, force=True)
    assert not unchanged(fresh, before)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)], ids=str)
def test_trained_norms_mark_a_trained_network(batches, norm):
    norm = copy.deepcopy(norm)
    nn.init.normal_(norm.weight, 1.0, 0.1)
    nn.init.normal_(norm.bias, 0.0, 0.1)
    net = Net(norm=norm)
    assert "trained before (norm.weight" in str(equalize_(net, batches))
    nn.init.ones_(norm.weight)
    assert "trained before (norm.bias" in str(equalize_(net, batches))


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4)], ids=str)
def test_norm_weights_drawn_at_random_are_fresh(batches, norm, mean):
    norm = copy.deepcopy(norm)
    nn.init.normal_(norm.weight, mean, 0.02)
    assert len(equalize_(Net(norm=norm), batches).fusions) == 1


def test_running_statistics_mark_a_trained_network(batches):
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight, 1.0, 0.02)
    norm.running_mean.normal_()
    assert "trained before (norm.weight" in str(equalize_(Net(norm=norm), batches))
    norm = nn.BatchNorm2d(4, affine=False)
    assert len(equalize_(Net(norm=copy.deepcopy(norm)), batches).fusions) == 1
    norm.running_mean.normal_()
    assert "trained before (norm.running_mean" in str(equalize_(Net(norm=norm), batches))


def test_frozen_layers_are_left_alone(batches):
    net = Net()
    net.fuse.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    assert "frozen" in str(equalize_(net, batches))
    assert "frozen" in str(equalize_(net, batches, force=True))
    assert unchanged(net, before)


def test_reparametrizing_keeps_the_very_parameter_and_its_gradient_hooks(batches):
    net = Net()
    weight, calls = net.fuse.weight, []
    weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    report = equalize_(net, batches, mode="reparametrize")
    assert dict(net.named_parameters())["fuse.weight"] is weight
    net(batches[0]).sum().backward()
    assert calls == [1]
    wide = weight.grad[:, 3:] / report.rows[1]["scale"]
    plain = Net()
    plain.load_state_dict(net.state_dict())
    plain(batches[0]).sum().backward()
    torch.testing.assert_close(wide, plain.fuse.weight.grad[:, 3:], rtol=1e-4, atol=1e-3)


def test_baking_a_copy_leaves_the_original(batches):
    net = Net()
    equalize_(net, batches, mode="reparametrize")
    expected = net(batches[0])
    replica = bake_(copy.deepcopy(net))
    assert type(replica.fuse) is nn.Conv2d
    assert torch.equal(replica(batches[0]), expected)
    assert torch.equal(net(batches[0]), expected)
    assert type(net.fuse) is not nn.Conv2d
    net.load_state_dict(replica.state_dict(), strict=True)
    torch.testing.assert_close(net(batches[0]), expected)


def test_one_layer_compiled_by_itself_is_equalized(batches):
    net, plain = Net(), Net()
    plain.load_state_dict(net.state_dict())
    net.fuse = torch.compile(net.fuse, backend="eager")
    for mode in ("fold", "reparametrize"):
        first, second = copy.deepcopy(net), copy.deepcopy(plain)
        equalize_(first, batches, mode=mode)
        equalize_(second, batches, mode=mode)
        weights = first.fuse._orig_mod.weight, second.fuse.weight
        assert torch.equal(*weights)


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_finding_measuring_and_proving_cost_few_forward_passes(make_network, mode):
    torch.manual_seed(0)
    net, images = make_network(), []
    net.register_forward_pre_hook(lambda _, args: images.append(len(args[0])))
    equalize_(net, [torch.randn(8, 3, 16, 16) for _ in range(32)], tolerance=0, mode=mode)
    assert sum(images) <= 1.5 * 32 * 8


class Alternating(nn.Module):
    """Runs one of two fusions, whichever the batch's mean asks for."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        fuse = self.high if x.mean() > 5 else self.low
        return fuse(torch.cat([x, 20 * x], 1))


def test_fusion_without_its_own_proof_is_said(batches):
    plan = (*find_fusions(Alternating(), batches[0]), *find_fusions(Alternating(), batches[0] + 9))
    net = Alternating()
    report = equalize_(net, [batches[0] + 9, batches[1]], fusions=plan)
    assert [fusion.name for fusion in report.fusions] == ["low", "high"]
    assert "does not run them: high" in " ".join(report.notes)


def test_proof_takes_a_batch_that_runs_the_fusions(batches):
    net = Alternating()
    report = equalize_(net, [batches[0], batches[1] + 9])
    assert [fusion.name for fusion in report.fusions] == ["low"]
    assert not any("proved" in note for note in report.notes)
    assert any(note.startswith("high takes concatenated") for note in report.notes)
