"""Schedule against mmengine's formulas, parameter groups against the recipes' tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import FCNHead, UPerHead
from seglab.optim import NoDecay, ParameterRules, StageDecay, WarmupPolyLR, build_optimizer

AUXILIARY = partial(FCNHead, channels=4, in_index=2, num_convs=1, concat_input=False)


def make_optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def run(scheduler: WarmupPolyLR, n_steps: int) -> list[list[float]]:
    rates = []
    for _ in range(n_steps):
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def expected(
    base: float, t: int, total: int, warmup: int = 0, power: float = 1.0, eta_min: float = 0.0
) -> float:
    if t < warmup:
        return base * (1e-6 + (1 - 1e-6) * t / (warmup - 1))
    return (base - eta_min) * (1 - (t - warmup) / (total - warmup - 1)) ** power + eta_min


def test_transformer_schedule_follows_the_closed_form() -> None:
    scheduler = WarmupPolyLR(make_optimizer(6e-5), total_steps=4000, warmup_steps=1500)
    for t, (rate,) in enumerate(run(scheduler, 4000)):
        assert rate == pytest.approx(expected(6e-5, t, 4000, 1500), rel=1e-12, abs=1e-18), t


def test_resnet_schedule_ends_at_exactly_eta_min() -> None:
    scheduler = WarmupPolyLR(make_optimizer(0.01), total_steps=800, power=0.9, eta_min=1e-4)
    rates = [rate for (rate,) in run(scheduler, 803)]
    assert rates[0] == 0.01
    assert rates[400] == pytest.approx(expected(0.01, 400, 800, 0, 0.9, 1e-4), rel=1e-12)
    assert rates[799] == 1e-4
    assert rates[800:] == [1e-4] * 3


def test_warm_up_reaches_the_base_rate_on_its_last_step() -> None:
    scheduler = WarmupPolyLR(make_optimizer(2.0), total_steps=20, warmup_steps=5)
    rates = [rate for (rate,) in run(scheduler, 20)]
    assert rates[0] == 2e-6
    assert rates[4] == rates[5] == 2.0
    assert rates[19] == 0.0


def test_groups_keep_their_ratio() -> None:
    scheduler = WarmupPolyLR(make_optimizer(1.0, 0.25), total_steps=50, warmup_steps=10)
    assert all(low == 0.25 * high for high, low in run(scheduler, 50))


def test_resumed_schedule_continues_exactly() -> None:
    def make() -> WarmupPolyLR:
        return WarmupPolyLR(make_optimizer(1.0), 30, warmup_steps=4, power=0.9, eta_min=1e-3)

    whole = run(make(), 30)
    first = make()
    run(first, 11)
    second = make()
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert run(second, 19) == whole[11:]


def test_length_may_be_told_after_construction() -> None:
    scheduler = WarmupPolyLR(make_optimizer(1.0), warmup_steps=2)
    assert scheduler.total_steps is None
    scheduler.total_steps = 5
    assert [rate for (rate,) in run(scheduler, 5)][-1] == 0.0


def test_unknown_length_and_too_long_warm_up_are_named() -> None:
    with pytest.raises(ValueError, match="does not know when to end"):
        run(WarmupPolyLR(make_optimizer(1.0)), 2)
    with pytest.raises(ValueError, match="total_steps=5 leaves nothing after warmup_steps=5"):
        WarmupPolyLR(make_optimizer(1.0), total_steps=5, warmup_steps=5)


def tiny_network(encoder: str) -> Segmenter:
    return Segmenter(TimmEncoder(encoder), partial(UPerHead, channels=4), AUXILIARY, 3)


def find_groups(network: nn.Module, rules: ParameterRules) -> dict[str, tuple[float, float]]:
    """Full parameter name -> (learning rate, weight decay), each parameter exactly once."""
    factory = partial(torch.optim.AdamW, lr=1e-4, weight_decay=0.05)
    groups = build_optimizer(network, factory, rules).param_groups
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    listed = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert sorted(name for name, _ in listed) == sorted(names.values())
    return dict(listed)


def test_swin_rule_spares_norms_and_position_tables_only() -> None:
    network = tiny_network("swin_tiny_patch4_window7_224")
    found = find_groups(network, NoDecay(["norm", "relative_position_bias_table"]))
    spared = {name for name, (_, decay) in found.items() if decay == 0}
    assert "encoder.norm0.weight" in spared
    assert "encoder.model.patch_embed.norm.bias" in spared
    assert "encoder.model.layers.1.downsample.norm.weight" in spared
    assert "encoder.model.layers.0.blocks.1.attn.relative_position_bias_table" in spared
    assert not [name for name in spared if "_head." in name]  # batch norms are called bn: decayed
    assert found["decode_head.bottleneck.bn.weight"] == (1e-4, 0.05)
    assert found["encoder.model.layers.0.blocks.0.attn.qkv.bias"] == (1e-4, 0.05)


def test_twins_rule_decays_positional_convolutions() -> None:
    found = find_groups(tiny_network("twins_svt_small"), NoDecay(["norm"]))
    assert found["encoder.model.pos_block.0.proj.0.weight"][1] == 0.05
    assert found["encoder.model.blocks.0.1.attn.norm.weight"][1] == 0
    assert found["encoder.model.patch_embeds.3.norm.weight"][1] == 0


@pytest.mark.parametrize(
    ("n_layers", "table"),
    [
        (6, (0.4783, 0.5314, 0.5905, 0.6561, 0.7290)),
        (12, (0.2542, 0.2824, 0.3138, 0.3487, 0.3874)),
    ],
)
def test_convnext_stages_learn_at_the_rates_of_the_table(
    n_layers: int, table: tuple[float, ...]
) -> None:
    found = find_groups(tiny_network("convnext_atto"), StageDecay(0.9, n_layers))
    parts = (
        "encoder.model.stem.0.weight",
        "encoder.model.stages.0.blocks.0.mlp.fc1.weight",
        "encoder.model.stages.1.blocks.0.mlp.fc1.weight",
        "encoder.model.stages.2.blocks.5.mlp.fc1.weight",
        "encoder.model.stages.3.blocks.1.mlp.fc1.weight",
    )
    for name, scale in zip(parts, table, strict=True):
        assert found[name][0] == pytest.approx(1e-4 * scale, rel=2e-4), name
    for stage in (1, 2, 3):
        name = f"encoder.model.stages.{stage}.downsample.1.weight"
        assert found[name][0] == found[parts[0]][0], name
    for name in ("encoder.norm3.weight", "decode_head.conv_seg.weight"):
        assert found[name][0] == 1e-4, name
    assert found["auxiliary_head.convs.0.conv.weight"] == (1e-4, 0.05)


def test_convnext_vectors_and_biases_do_not_decay() -> None:
    network = tiny_network("convnext_atto")
    found = find_groups(network, StageDecay(0.9, 6))
    for name, parameter in network.named_parameters():
        assert (found[name][1] == 0) == (parameter.ndim == 1 or name.endswith("bias")), name


def test_frozen_parameters_stay_out() -> None:
    network = tiny_network("resnet18")
    network.encoder.requires_grad_(False)
    groups = build_optimizer(network, torch.optim.SGD, NoDecay(["bn"])).param_groups
    n_trainable = sum(1 for p in network.parameters() if p.requires_grad)
    assert sum(len(group["params"]) for group in groups) == n_trainable
    plain = build_optimizer(network, torch.optim.SGD).param_groups
    assert len(plain[0]["params"]) == n_trainable


OPTIMIZERS = [
    partial(torch.optim.Adam, lr=0.01),
    partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("factory", OPTIMIZERS, ids=lambda factory: factory.func.__name__)
def test_fused_step_equals_the_loop(
    factory: partial[torch.optim.Optimizer], layout: torch.memory_format, scaled: bool
) -> None:
    def train(make: Callable[[nn.Module], torch.optim.Optimizer]) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3)).to(
            torch.float64, memory_format=layout
        )
        optimizer = make(module)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(5):
            optimizer.zero_grad()
            loss = module(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return module

    ours = train(lambda module: build_optimizer(module, factory))
    loop = train(lambda module: factory(module.parameters(), foreach=False))
    optimizer = build_optimizer(ours, factory)
    assert optimizer.param_groups[0]["fused"] is True
    # Else Lightning refuses to clip gradients under 16-mixed.
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    for found, expected in zip(ours.parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_closure", [False, True])
def test_gradient_of_another_layout_gives_the_same_step(by_closure: bool) -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(4, 3, 5, 5, dtype=torch.float64))
    loop = nn.Parameter(ours.detach().clone())
    fused = build_optimizer(nn.ParameterList([ours]), partial(torch.optim.AdamW, lr=0.1))
    assert fused.param_groups[0]["fused"]
    plain = torch.optim.AdamW([loop], lr=0.1, foreach=False)
    for _ in range(3):
        loop.grad = torch.randn(4, 3, 5, 5, dtype=torch.float64)

        def closure() -> float:
            assert loop.grad is not None
            ours.grad = loop.grad.to(memory_format=torch.channels_last)
            return 1.0

        assert (fused.step(closure) if by_closure else closure()) == 1.0
        if not by_closure:
            fused.step()
        plain.step()
    torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)


def test_weights_with_gaps_in_memory_are_stepped_one_by_one() -> None:
    module = nn.Linear(4, 4, bias=False)
    module.weight = nn.Parameter(torch.zeros(4, 8)[:, ::2])
    assert not build_optimizer(module, torch.optim.AdamW).param_groups[0]["fused"]


@pytest.mark.parametrize(
    "factory",
    [
        partial(torch.optim.AdamW, fused=False),
        partial(torch.optim.AdamW, foreach=True),
        partial(torch.optim.AdamW, differentiable=True),
        torch.optim.SGD,
        torch.optim.Adagrad,
        torch.optim.RMSprop,
    ],
    ids=["fused=False", "foreach=True", "differentiable", "SGD", "Adagrad", "RMSprop"],
)
def test_fused_step_is_not_forced(factory: Callable[..., torch.optim.Optimizer]) -> None:
    group = build_optimizer(nn.Linear(2, 2), factory).param_groups[0]
    assert not group.get("fused")


def test_rules_that_match_nothing_are_refused() -> None:
    network = tiny_network("resnet18")
    with pytest.raises(ValueError, match="no parameter's name contains 'pos_embed'"):
        NoDecay(["bn", "pos_embed"])(network, 1e-4, 0.05)
    with pytest.raises(ValueError, match="StageDecay is for ConvNeXt"):
        StageDecay()(network, 1e-4, 0.05)
