"""Folded, reparametrized and explicit form: equal where theory says so, different elsewhere."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from scale_equalization import (
    AlreadyEqualizedError,
    Report,
    ScaleEqualizationError,
    ScaleEqualizer,
    bake_,
    equalize_,
    equivalent_param_groups,
    find_fusions,
    fold_,
    measure_scales,
    reparametrize_,
)
from torch import nn


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.detach().numpy().tobytes()).hexdigest()


@pytest.fixture
def double_batches(batches):
    return [batch.double() for batch in batches]


@pytest.mark.parametrize("apply", [fold_, reparametrize_])
def test_logits_equal_the_explicit_module_at_step_zero(
    make_network, make_explicit, double_batches, apply
):
    network = make_network().double()
    report = measure_scales(network, double_batches)
    explicit = make_explicit(report).double()
    apply(network, report)
    difference = network(double_batches[0]) - explicit(double_batches[0])
    assert difference.abs().max() <= 1e-10


def test_centred_fold_equals_the_explicit_module_inside(
    make_network, make_explicit, double_batches
):
    network = make_network(bias=True).double()
    network.inner_bn, network.outer_bn = nn.Identity(), nn.Identity()
    report = equalize_(network, double_batches, center=True)
    explicit = make_explicit(report, bias=True, center=True).double()
    explicit.inner_bn, explicit.outer_bn = nn.Identity(), nn.Identity()
    difference = (network(double_batches[0]) - explicit(double_batches[0])).abs()
    assert difference[..., 7:-7, 7:-7].max() <= 1e-10
    assert difference.max() > 1e-3  # at zero-padded borders a folded mean cannot be exact
    assert any("zero-padded borders" in note for note in report.notes)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    network.train()
    for _ in range(steps):
        x = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
        target = (x.sum(1) > 0).long() + (x[:, 0] > 1).long()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), target).backward()
        optimizer.step()
    return network(x).detach()


SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
ADAMW = {"lr": 0.01, "weight_decay": 0.1}
RULES = [(torch.optim.SGD, SGD), (torch.optim.AdamW, ADAMW)]


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_reparametrized_training_equals_explicit_training(
    make_network, make_explicit, double_batches, rule, options
):
    network = make_network().double()
    report = equalize_(network, double_batches, mode="reparametrize")
    explicit = make_explicit(report).double()
    ours = train(network, rule(network.parameters(), **options))
    theirs = train(explicit, rule(explicit.parameters(), **options))
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@pytest.mark.parametrize(("rule", "options"), RULES)
@pytest.mark.parametrize("matched", [True, False])
def test_folded_training_equals_explicit_with_the_groups_only(
    make_network, make_explicit, double_batches, rule, options, matched
):
    network = make_network().double()
    report = equalize_(network, double_batches)
    # Gradients are related by the scale where inputs are centred: give both the centred input.
    explicit = make_explicit(report).double()
    groups = network.parameters()
    if matched:
        name = rule.__name__.lower()
        decay = options["weight_decay"]
        groups = equivalent_param_groups(
            network, report, name, lr=options["lr"], weight_decay=decay
        )
    ours = train(network, rule(groups, **options))
    theirs = train(explicit, rule(explicit.parameters(), **options))
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert (difference <= 1e-7) if matched else (difference >= 1e-3)


@pytest.mark.parametrize("mode", ["fold", "reparametrize"])
def test_only_the_named_layers_change(make_network, batches, mode):
    network = make_network()
    before = {name: digest(values) for name, values in network.state_dict().items()}
    report = equalize_(network, batches, mode=mode)
    after = {name: digest(values) for name, values in network.state_dict().items()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{fusion.name}.weight" for fusion in report.fusions}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(12, 6, 3),
        nn.Conv2d(12, 6, 3, groups=3),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.Conv3d(12, 6, 1),
        nn.ConvTranspose2d(12, 6, 2),
        nn.ConvTranspose2d(12, 6, 2, groups=2),
        nn.Linear(12, 6),
    ],
    ids=str,
)
def test_fold_equals_scaling_the_input_for_every_layer(layer):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = layer.double()
            self.factors = (1.0, 1.0)

        def forward(self, x):
            a, b = x[..., :5] if flat else x[:, :5], x[..., 5:] if flat else x[:, 5:]
            parts = [self.factors[0] * a, self.factors[1] * b]
            return self.fuse(torch.cat(parts, dim=-1 if flat else 1))

    flat = isinstance(layer, nn.Linear)
    rank = 0 if flat else layer.weight.dim() - 2
    shape = (2, 7, 12) if flat else (2, 12, *(5,) * rank)
    x = torch.randn(*shape, dtype=torch.float64) * 3
    network = Net()
    report = measure_scales(network, [x])
    network.factors = tuple(row["scale"] for row in report.rows)
    expected = network(x)
    network.factors = (1.0, 1.0)
    fold_(network, report)
    assert (network(x) - expected).abs().max() <= 1e-12


def test_mean_is_folded_into_the_bias_of_every_kind(batches):
    for layer in (nn.Conv2d(6, 4, 1, groups=2), nn.ConvTranspose2d(6, 4, 1, groups=2)):
        network = nn.Sequential()
        network.fuse = layer
        network.forward = lambda x, f=layer: f(torch.cat([x + 5, 3 * x], dim=1))
        report = measure_scales(network, batches)
        x = batches[0]
        parts = [x + 5, 3 * x]
        centred = [(p - r["mean"]) / r["std"] for p, r in zip(parts, report.rows, strict=True)]
        expected = layer(torch.cat(centred, dim=1))
        equalize_(network, batches, center=True)
        assert torch.allclose(network.forward(x), expected, atol=1e-4)


def test_preserve_norm_changes_ratios_only(make_network, batches):
    plain, kept = make_network(), make_network()
    norm = kept.outer.weight.norm().item()
    folded = equalize_(plain, batches)
    report = equalize_(kept, batches, preserve_norm=True)
    ratio = [a["scale"] / b["scale"] for a, b in zip(folded.rows, report.rows, strict=True)]
    assert kept.outer.weight.norm().item() == pytest.approx(norm, rel=1e-5)
    assert ratio[2] == pytest.approx(ratio[3], rel=1e-9)


def test_placebo_changes_the_norm_as_folding_but_no_ratio(make_network, batches):
    plain, control = make_network(), make_network()
    equalize_(plain, batches)
    report = equalize_(control, batches, placebo=True)
    assert control.outer.weight.norm().item() == pytest.approx(
        plain.outer.weight.norm().item(), rel=1e-5
    )
    assert report.rows[2]["scale"] == report.rows[3]["scale"]


def test_second_application_is_refused_unless_forced(make_network, batches):
    network = make_network()
    report = equalize_(network, batches)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(AlreadyEqualizedError, match=r"inner is equalized already.*force=True"):
        fold_(network, report)
    again = equalize_(network, batches)
    assert again.fusions == ()
    assert "left alone: inner, outer: it is equalized already; force=True" in str(again)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    fold_(network, report, force=True)
    assert not torch.equal(network.outer.weight, before["outer.weight"])


def test_trained_network_is_left_alone(make_network, double_batches):
    network = make_network().double()
    train(network, torch.optim.SGD(network.parameters(), lr=0.1), steps=1)
    before = copy.deepcopy(network.state_dict())
    assert "trained before (inner_bn.weight is no longer" in str(equalize_(network, double_batches))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert len(equalize_(network, double_batches, force=True).fusions) == 2


def test_nothing_changes_if_one_layer_does_not_fit(make_network, batches):
    network = make_network()
    report = measure_scales(network, batches)
    network.outer = nn.Conv2d(13, 9, 3, padding=1)
    before = network.inner.weight.clone()
    with pytest.raises(ScaleEqualizationError, match=r"outer.weight is \(9, 13, 3, 3\).*made for"):
        fold_(network, report)
    assert torch.equal(network.inner.weight, before)
    with pytest.raises(ScaleEqualizationError, match="no layer 'inner'"):
        fold_(nn.Sequential(), report)


def test_reparametrized_state_is_plain_both_ways(make_network, batches):
    network, bare = make_network(), make_network(seed=1)
    equalize_(network, batches, mode="reparametrize")
    bare.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(bare(batches[0]), network(batches[0]))
    other = make_network(seed=2)
    network.load_state_dict(other.state_dict(), strict=True)
    assert torch.allclose(network(batches[0]), other(batches[0]), atol=1e-5)


def test_bake_leaves_a_plain_network(make_network, batches):
    network = make_network()
    parameter = network.outer.weight
    equalize_(network, batches, mode="reparametrize")
    expected = network(batches[0])
    bake_(network)
    assert type(network.outer) is nn.Conv2d
    assert network.outer.weight is parameter
    assert torch.equal(network(batches[0]), expected)
    assert set(network.state_dict()) == set(make_network().state_dict())
    assert not network.outer._state_dict_hooks


def test_deepcopy_of_a_reparametrized_network_is_independent(make_network, batches):
    network = make_network()
    equalize_(network, batches, mode="reparametrize")
    replica = copy.deepcopy(network)
    with torch.no_grad():
        network.outer._parameters["weight"].zero_()
    assert replica.outer.weight.abs().sum() > 0
    assert set(replica.state_dict()) == set(make_network().state_dict())


def test_report_survives_json(make_network, batches, tmp_path):
    import json

    report = equalize_(make_network(), batches)
    path = report.save(tmp_path / "logs" / "report.json")
    assert Report.from_dict(json.loads(path.read_text())) == report


def test_table_names_every_branch_once(make_network, batches):
    report = equalize_(make_network(), batches)
    lines = str(report).splitlines()
    assert "4 branches of 2 fusions" in lines[0]
    assert lines[1].split() == [
        *("fusion", "branch", "channels", "from", "upsampling", "mean", "std", "scale")
    ]
    assert [line.split()[0] for line in lines[2:6]] == ["inner", "1", "outer", "1"]
    assert "2x bilinear" in lines[3]


def test_options_that_exclude_each_other_are_refused(make_network, batches):
    with pytest.raises(ValueError, match="exclude each other"):
        equalize_(make_network(), batches, placebo=True, preserve_norm=True)
    with pytest.raises(ValueError, match=r"mode is 'folded'.*fold, reparametrize, off"):
        equalize_(make_network(), batches, mode="folded")
    with pytest.raises(ValueError, match="std must be positive, got 0"):
        ScaleEqualizer(std=0.0)


def test_off_changes_nothing(make_network, batches):
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    assert equalize_(network, batches, mode="off").mode == "off"
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert find_fusions(network, batches[0])[0].name == "inner"
