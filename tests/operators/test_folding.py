"""Batch normalization is folded where that is right, and left alone everywhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from seglab.models import FusionConv2d
from seglab.operators.folding import fold_batch_norms_
from seglab.operators.fusion_conv import FusionBlock


def lively(network: nn.Module) -> nn.Module:
    """In evaluation, with statistics and weights that matter."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    nn.init.normal_(tensor.data, 0.3)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    nn.init.uniform_(tensor.data, 0.5, 2.0)
    return network.eval()


def norm_by_hand(x: np.ndarray, norm: nn.Module) -> np.ndarray:
    """A batch normalization in float64, from its definition."""
    mean, var, gamma, beta = (
        tensor.detach().double().numpy().reshape(1, -1, *[1] * (x.ndim - 2))
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return gamma * (x - mean) / np.sqrt(var + norm.eps) + beta


CONVOLUTIONS = {
    "plain": (nn.Conv2d(4, 6, 3), (2, 4, 9, 8)),
    "without bias": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 8)),
    "strided and dilated": (nn.Conv2d(4, 6, 3, 2, 2, 2), (2, 4, 9, 8)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 8)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 9, 8)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"), (2, 4, 9, 8)),
    "circular": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 9, 8)),
    "one axis": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "three axes": (nn.Conv3d(4, 6, 2), (2, 4, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 5, 4)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 4)),
    "linear": (nn.Linear(4, 6), (3, 4)),
}


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_folded_layer_equals_norm_by_hand(name: str) -> None:
    layer, shape = copy.deepcopy(CONVOLUTIONS[name])
    norms = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    n_out = getattr(layer, "out_channels", None) or layer.out_features
    network = lively(nn.Sequential(layer, norms[len(shape)](n_out, eps=0.1))).double()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = norm_by_hand(layer(x).numpy(), network[1])
    done = fold_batch_norms_(network, x)
    assert done.n_norms == 1
    assert not done.left
    assert len(network[1]) == 0  # nothing is left to be computed
    np.testing.assert_allclose(network(x).numpy(), expected, rtol=1e-10, atol=1e-12)


class Net(nn.Module):
    """Two convolutions and two normalizations, put together by a function."""

    def __init__(self, forward: Callable[[Net, Tensor], object], norm: nn.Module | None = None):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm = norm or nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.wide = nn.BatchNorm2d(8)
        self.function = forward

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def _second_reader(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.norm(y) + y.relu()


def _reader_without_effect_here(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.norm(y) + (y - 1e6).relu()  # zero for every input that is likely


def _changed_in_place(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    y += 1
    return m.norm(y)


def _through_numpy(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.norm(y) + torch.from_numpy(np.maximum(y.detach().numpy(), 0))


def _kept_and_returned(m: Net, x: Tensor) -> dict[str, Tensor]:
    y = m.a(x)
    return {"logits": m.norm(y), "features": y}


def _two_norms(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.a(x)) + m.other(m.a(x))


def _one_of_two_readings(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.a(x)) + m.a(x.flip(-1))


def _norm_of_something_else_too(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.a(x)) + m.norm(m.b(x).relu())


def _weight_read_elsewhere(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.a(x)) + m.a.weight.mean()


def _weight_used_by_a_function(m: Net, x: Tensor) -> Tensor:
    return m.norm(m.a(x)) + F.conv2d(x, m.a.weight, padding=1)


LEFT_ALONE = {
    "second reader": _second_reader,
    "second reader without effect": _reader_without_effect_here,
    "changed in place": _changed_in_place,
    "read through numpy": _through_numpy,
    "returned beside": _kept_and_returned,
    "two norms after one layer": _two_norms,
    "layer also without norm": _one_of_two_readings,
    "norm also after relu": _norm_of_something_else_too,
    "weight read elsewhere": _weight_read_elsewhere,
    "weight in a function": _weight_used_by_a_function,
    "concatenation": lambda m, x: m.wide(torch.cat([m.a(x), m.b(x)], 1)),
    "sum": lambda m, x: m.norm(m.a(x) + m.b(x)),
    "upsampled between": lambda m, x: m.norm(F.interpolate(m.a(x), scale_factor=2)),
    "view between": lambda m, x: m.norm(m.a(x)[:, :, 1:]),
    "norm first": lambda m, x: m.a(nn.functional.pad(m.norm(m.a(x))[:, :3], [1, 1])),
    "autograd function between": lambda m, x: m.norm(Doubled.apply(m.a(x))),
}


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x


def outputs(network: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = network(x)
    return list(found.values()) if isinstance(found, dict) else [found]


@pytest.mark.parametrize("name", list(LEFT_ALONE))
def test_what_cannot_be_folded_stays(name: str) -> None:
    network = lively(Net(LEFT_ALONE[name]))
    x = torch.randn(2, 3, 6, 7)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    expected = outputs(network, x)
    done = fold_batch_norms_(network, x)
    assert done.n_norms == 0
    assert done.left
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    assert all(map(torch.equal, outputs(network, x), expected))


FOLDED = {
    "norm shared by two layers": lambda m, x: m.norm(m.a(x)) + m.norm(m.b(x)),
    "layer and norm called twice": lambda m, x: m.norm(m.a(x)) * m.norm(m.a(x.flip(-1))),
    "dropout between": lambda m, x: m.norm(F.dropout(m.a(x), 0.5, m.training)),
    "followed in place": lambda m, x: F.relu_(m.norm(m.a(x))),
}


@pytest.mark.parametrize("name", list(FOLDED))
def test_unusual_but_right_is_folded(name: str) -> None:
    network = lively(Net(FOLDED[name])).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    (expected,) = outputs(network, x)
    done = fold_batch_norms_(network, x)
    assert done.n_norms == 1
    (found,) = outputs(network, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_tied_weights_are_left_alone() -> None:
    network = Net(lambda m, x: m.norm(m.a(x)) + m.b(x))
    network.b.weight = network.a.weight
    x = torch.randn(2, 3, 6, 7)
    (expected,) = outputs(lively(network), x)
    assert fold_batch_norms_(network, x).n_norms == 0
    assert torch.equal(outputs(network, x)[0], expected)


def test_memory_shared_by_two_weights_stays_right() -> None:
    network = Net(lambda m, x: m.norm(m.a(x)) + m.b(x)).double()
    network.b.weight = nn.Parameter(network.a.weight.data)  # another parameter, the same memory
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    (expected,) = outputs(lively(network), x)
    fold_batch_norms_(network, x)
    torch.testing.assert_close(outputs(network, x)[0], expected, rtol=1e-10, atol=1e-12)


class Odd(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=1)


class Renamed(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _in_training(network: Net) -> None:
    network.norm.train()


def _hooked_layer(network: Net) -> None:
    network.a.register_forward_hook(lambda module, args, output: output * 2)


def _hooked_norm(network: Net) -> None:
    network.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _without_statistics(network: Net) -> None:
    network.norm = nn.BatchNorm2d(4, track_running_stats=False).eval()


def _own_forward(network: Net) -> None:
    network.norm = lively(Odd(4))


def _parametrized(network: Net) -> None:
    parametrizations.weight_norm(network.a)


def _parametrized_norm(network: Net) -> None:
    parametrize.register_parametrization(network.norm, "weight", nn.Softplus())


def _old_spectral_norm(network: Net) -> None:
    nn.utils.spectral_norm(network.a)
    network.a.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        _in_training, _hooked_layer, _hooked_norm, _without_statistics, _own_forward,
        _parametrized, _parametrized_norm, _old_spectral_norm,
    ],
)  # fmt: skip
def test_special_layers_are_left_alone(change: Callable[[Net], None]) -> None:
    network = lively(Net(lambda m, x: m.norm(m.a(x))))
    change(network)
    x = torch.randn(2, 3, 6, 7)
    twin = copy.deepcopy(network)
    done = fold_batch_norms_(network, x)
    assert done.n_norms == 0
    assert done.left
    assert torch.equal(outputs(network, x)[0], outputs(twin, x)[0])


def test_hook_of_a_container_between_is_seen() -> None:
    network = lively(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    seen: list[Tensor] = []
    network[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert fold_batch_norms_(network, torch.randn(1, 3, 6, 6)).n_norms == 0


def test_norm_in_training_keeps_statistics() -> None:
    network = lively(Net(lambda m, x: m.norm(m.a(x))))
    network.norm.train()
    mean = network.norm.running_mean.clone()
    fold_batch_norms_(network, torch.randn(2, 3, 6, 7))
    assert torch.equal(network.norm.running_mean, mean)


def test_subclass_that_only_normalizes_is_folded() -> None:
    network = lively(Net(lambda m, x: m.norm(m.a(x)), Renamed(4)))
    assert fold_batch_norms_(network, torch.randn(2, 3, 6, 7)).n_norms == 1


def test_frozen_weights_are_folded_too() -> None:
    network = lively(Net(lambda m, x: m.norm(m.a(x)))).double().requires_grad_(False)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    (expected,) = outputs(network, x)
    assert fold_batch_norms_(network, x).n_norms == 1
    torch.testing.assert_close(outputs(network, x)[0], expected, rtol=1e-10, atol=1e-12)


def test_activation_inside_the_norm_stays() -> None:
    from timm.layers import BatchNormAct2d

    network = lively(Net(lambda m, x: m.norm(m.a(x)), BatchNormAct2d(4))).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    (expected,) = outputs(network, x)
    assert fold_batch_norms_(network, x).n_norms == 1
    found = outputs(network, x)[0]
    assert (found == 0).any()  # its ReLU
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Switching(nn.Module):
    """Looks at what it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        scale = 2 if isinstance(self.norm, nn.BatchNorm2d) else 3  # asks what it is made of
        return self.norm(y) * scale


def test_network_that_asks_for_its_norm_is_undone() -> None:
    network = lively(Switching())
    done = fold_batch_norms_(network, torch.randn(1, 3, 6, 6))
    assert done.n_norms == 0
    assert done.left == {"norm": "folded, the network computes otherwise"}


def test_fault_of_one_norm_leaves_the_others_folded() -> None:
    network = lively(nn.Sequential(Switching(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    done = fold_batch_norms_(network, torch.randn(1, 3, 6, 6))
    assert [pair.reader for pair in done.pairs] == ["2"]
    assert list(done.left) == ["0.norm"]


class WithoutItsBias(nn.Conv2d):
    """Takes no bias, though it has the attribute."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


@pytest.mark.parametrize(
    "hide",
    [
        lambda y: y.argmax(1),
        lambda y: y > 0,
        lambda y: torch.cat([y, torch.full_like(y, -torch.inf)], 1),
        lambda y: 0 * y,
    ],
)
def test_fault_hidden_by_the_outputs_is_seen(hide: Callable[[Tensor], Tensor]) -> None:
    network = Net(lambda m, x: (x + 1, hide(m.norm(m.a(x)))))
    network.a = WithoutItsBias(3, 4, 3, bias=False)
    network = lively(network)
    assert fold_batch_norms_(network, torch.rand(1, 3, 8, 8)).n_norms == 0
    assert isinstance(network.norm, nn.BatchNorm2d)
    assert network.a.bias is None


@pytest.mark.parametrize("force", ["plain", "fused"])
def test_fusion_layer_takes_its_norm_in(force: str) -> None:
    block = lively(FusionBlock([5, 4, 3], 6)).double()
    assert isinstance(block.conv, FusionConv2d)
    block.conv.force = force  # type: ignore[assignment]
    branches = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((5, 12), (4, 6), (3, 3))]
    whole = torch.cat([F.interpolate(x, (12, 12), mode="bilinear") for x in branches], 1)
    with torch.no_grad():
        plain = F.conv2d(whole, block.conv.weight, padding=1).numpy()
        expected = np.maximum(norm_by_hand(plain, block.bn), 0)
        done = fold_batch_norms_(block, branches)
        assert done.n_norms == 1
        np.testing.assert_allclose(block(branches).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_folded_network_refuses_training() -> None:
    network = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    fold_batch_norms_(network, torch.randn(1, 3, 6, 6))
    with pytest.raises(RuntimeError, match="to train, load the checkpoint again"):
        network.train()
    network.eval()


def test_network_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call \.eval\(\) before folding"):
        fold_batch_norms_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.zeros(1))


def test_network_that_fails_in_float64_is_left_alone() -> None:
    class Single(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    network = lively(Single(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    done = fold_batch_norms_(network, torch.randn(1, 3, 6, 6))
    assert done.n_norms == 0
    assert "does not run in float64" in str(done)


def test_watching_leaves_no_trace() -> None:
    network = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    fold_batch_norms_(network, torch.randn(1, 3, 6, 6))
    assert network[2].inplace is True
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
