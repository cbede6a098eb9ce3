"""How `FusionConv2d` behaves among torch's other features, and which way it takes when."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from seglab.operators.fusion_conv import FusionConv2d


def branches(channels: int = 4, fine: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = (fine, fine // 2, fine // 4)
    return [torch.randn(2, channels, side, side, generator=generator).to(dtype) for side in sides]


def operators(conv: nn.Module, *args: Any, **kwargs: Any) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        conv(*args, **kwargs)
    return {event.key for event in seen.key_averages()}


def is_fused(conv: nn.Module, *args: Any, **kwargs: Any) -> bool:
    return "seglab::fuse" in operators(conv, *args, **kwargs)


class Functions(TorchFunctionMode):
    """Records the names of the functions that are called."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def test_function_modes_see_ordinary_operations() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1, force="fused")
    with Functions() as mode:
        conv(branches())
    assert [mode.seen.count(name) for name in ("interpolate", "cat", "conv2d")] == [2, 1, 1]
    assert is_fused(conv, branches())


def test_a_default_device_does_not_count_as_watching() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1, force="fused")
    with torch.device("cpu"):
        assert is_fused(conv, branches())


def test_exported_programs_hold_ordinary_operations() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1, force="fused").requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch
        exported = torch.export.export(conv, (branches(),)).module()
        traced = torch.jit.trace(lambda *x: conv(list(x)), tuple(branches()))
    for graph in (str(exported.graph), str(traced.graph)):
        assert all(name in graph for name in ("upsample_bilinear2d", "cat", "conv"))
        assert "seglab::" not in graph
        assert "seglab." not in graph
    torch.testing.assert_close(exported(branches()), conv(branches()))
    torch.testing.assert_close(traced(*branches()), conv(branches()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    conv = FusionConv2d(12, 4, 3, padding=1, force="fused")
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for fine in (16, 24):
        inputs = [x.requires_grad_() for x in branches(fine=fine)]
        y = compiled(inputs)
        found = torch.autograd.grad(y.square().sum(), [*inputs, conv.weight])
        expected = conv(inputs, force="plain")
        wanted = torch.autograd.grad(expected.square().sum(), [*inputs, conv.weight])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_operator_keeps_its_contract_with_the_compiler() -> None:
    weights = [torch.randn(2, 4, 3, 3).requires_grad_() for _ in range(3)]
    geometry = [16, 16, 3, 1, 1, 1, 3, 1, 1, 1, 0, 0]
    features = [x.requires_grad_() for x in branches()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check itself looks at .grad of non-leaves
        torch.library.opcheck(
            torch.ops.seglab.fuse.default, (features, weights, torch.randn(2), geometry, True)
        )


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 3


def test_parametrized_weight_is_the_one_used() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1, bias=False, force="fused")
    before = conv(branches())
    parametrize.register_parametrization(conv, "weight", Scaled())
    after = conv(branches())
    torch.testing.assert_close(after, before * 3, rtol=1e-5, atol=1e-5)
    after.sum().backward()
    assert conv.parametrizations.weight.original.grad is not None


FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("formats", list(itertools.product(FORMATS, repeat=4)))
def test_memory_format_is_that_of_the_plain_way(formats: tuple[str, ...], kernel: int) -> None:
    conv = FusionConv2d(12, 4, kernel, padding=kernel // 2)
    *maps, weight = (FORMATS[name] for name in formats)
    conv.to(memory_format=weight)
    pairs = zip(branches(fine=4), maps, strict=True)  # the coarsest has one pixel
    given = [x.contiguous(memory_format=how).requires_grad_() for x, how in pairs]
    expected = torch.nn.functional.conv2d(
        torch.cat([nn.functional.interpolate(x, size=(4, 4), mode="bilinear") for x in given], 1),
        conv.weight, conv.bias, padding=kernel // 2,
    )  # fmt: skip
    found = conv(given, force="fused")
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_after_a_fusion_draws_the_same_mask() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1)
    masks = []
    for force in ("plain", "fused"):
        torch.manual_seed(0)
        first, *others = (x.to(memory_format=torch.channels_last) for x in branches())
        y = conv([first.contiguous(), *others], force=force)  # type: ignore[arg-type]
        masks.append(nn.functional.dropout(torch.ones_like(y)))
    assert torch.equal(*masks)


def test_gradients_follow_the_memory_format_of_the_branches() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1, force="fused")
    last = [x.to(memory_format=torch.channels_last).requires_grad_() for x in branches()]
    conv(last).sum().backward()
    assert all(x.grad.is_contiguous(memory_format=torch.channels_last) for x in last)


def test_vectorizing_and_forward_derivatives_take_the_plain_way() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1, force="fused")
    stacked = torch.vmap(lambda *x: conv(list(x)))(*(x[None] for x in branches()))
    torch.testing.assert_close(stacked[0], conv(branches()), rtol=1e-5, atol=1e-5)
    primal, tangent = branches(), tuple(branches())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch
        _, slope = torch.func.jvp(lambda *x: conv(list(x)), tuple(primal), tangent)
    linear = conv(branches()) - conv([torch.zeros_like(x) for x in primal])
    torch.testing.assert_close(slope, linear, rtol=1e-4, atol=1e-5)


def test_state_and_copies_are_those_of_a_convolution() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1)
    plain = nn.Conv2d(12, 4, 3, padding=1)
    conv.load_state_dict(plain.state_dict())
    assert list(conv.state_dict()) == ["weight", "bias"]
    twin = copy.deepcopy(conv)
    torch.testing.assert_close(twin(branches()), conv(branches()))


def test_matrices_made_in_inference_mode_serve_training() -> None:
    conv = FusionConv2d(12, 4, 3, padding=1, force="fused")
    inputs = branches(fine=20)
    with torch.inference_mode():
        conv(inputs)
    conv([x.requires_grad_() for x in inputs]).sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_empty_batch_passes() -> None:
    conv = FusionConv2d(8, 4, 3, padding=1, force="fused")
    y = conv([torch.zeros(0, 4, 8, 8), torch.zeros(0, 4, 4, 4)])
    assert y.shape == (0, 4, 8, 8)


def test_costs_choose_the_way_by_size() -> None:
    large, small = FusionConv2d(3 * 128, 128, 3, padding=1), FusionConv2d(12, 4, 3, padding=1)
    assert is_fused(large, branches(channels=128, fine=64))
    assert not is_fused(small, branches())
    assert not is_fused(large, branches(channels=128, fine=64), force="plain")
    assert is_fused(small, branches(), force="fused")


def test_same_sizes_are_never_fused() -> None:
    conv = FusionConv2d(8, 4, 3, padding=1, force="fused")
    assert not is_fused(conv, [torch.randn(1, 4, 8, 8)] * 2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"groups": 4}, "4 groups"),
        ({"padding_mode": "reflect"}, "padding_mode='reflect'"),
        ({"kernel_size": 2, "padding": "same"}, "kernel of"),
    ],
)
def test_what_cannot_be_fused_runs_plainly_and_refuses_force(
    arguments: dict[str, Any], reason: str
) -> None:
    conv = FusionConv2d(**{"in_channels": 12, "out_channels": 4, "kernel_size": 3} | arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch pads even kernels with a copy, and says so
        assert not is_fused(conv, branches(channels=4))
    with pytest.raises(ValueError, match=reason):
        conv(branches(), force="fused")


def test_wrong_arguments_are_named() -> None:
    conv = FusionConv2d(12, 4, 3)
    with pytest.raises(ValueError, match=r"expects 12 channels, got branches of \[4\]"):
        conv(branches()[:1])
    with pytest.raises(ValueError, match="force is 'plain', 'fused' or None, got 'fast'"):
        conv(branches(), force="fast")
    with pytest.raises(ValueError, match="mode is 'bilinear' or 'nearest', got 'bicubic'"):
        FusionConv2d(12, 4, 3, mode="bicubic")
