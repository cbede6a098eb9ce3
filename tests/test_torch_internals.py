"""What `seglab/torch_internals.py` takes from torch's private parts still is what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from seglab import torch_internals as internals


class Loud(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("seen")


class Wrapped(Tensor):
    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("seen")

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("dispatched")


def test_batch_norm_is_the_base_of_all_kinds() -> None:
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    assert all(issubclass(kind, internals.BatchNorm) for kind in kinds)
    assert not issubclass(nn.GroupNorm, internals.BatchNorm)


def test_unwatched_calls_reach_no_mode_and_no_subclass() -> None:
    wrapped = internals.tensor_without_memory(Wrapped, (2, 3), torch.float64, torch.device("cpu"))
    with Loud(), internals.Unwatched():
        assert wrapped.shape == (2, 3)
        assert wrapped.dtype == torch.float64
    with internals.UnwatchedBySubclasses():
        assert wrapped.dim() == 2
    with Loud(), internals.UnwatchedBySubclasses(), pytest.raises(AssertionError, match="seen"):
        wrapped.dim()


def test_transforms_are_noticed_while_they_last() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(internals.is_transforming())
        return x.sum()

    torch.func.vmap(look)(torch.zeros(2, 2))
    torch.func.grad(look)(torch.zeros(2))
    with forward_ad.dual_level():
        look(torch.zeros(1))
    assert seen == [True, True, True]
    assert not internals.is_transforming()


def test_function_modes_are_listed_from_outside_in() -> None:
    first, second = Loud(), Loud()
    assert internals.function_modes() == []
    with first, second:
        found = internals.function_modes()
    assert found[0] is first
    assert found[1] is second


def test_hooks_of_one_and_of_all_modules_are_found() -> None:
    module = nn.Linear(1, 1)
    assert not any(internals.hooks_of(module))
    registrations = [
        module.register_forward_pre_hook(lambda *_: None),
        module.register_forward_hook(lambda *_: None),
        module.register_full_backward_pre_hook(lambda *_: None),
        module.register_full_backward_hook(lambda *_: None),
    ]
    assert [list(hooks) for hooks in internals.hooks_of(module)] == [[r.id] for r in registrations]
    everywhere = [
        nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
        nn.modules.module.register_module_forward_hook(lambda *_: None),
        nn.modules.module.register_module_full_backward_pre_hook(lambda *_: None),
        nn.modules.module.register_module_full_backward_hook(lambda *_: None),
    ]
    try:
        found = [list(hooks) for hooks in internals.hooks_of_all_modules()]
        assert found == [[r.id] for r in everywhere]
    finally:
        for registration in everywhere:
            registration.remove()


def test_buffers_can_be_set_and_told_by_whether_they_are_saved() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("passing", torch.zeros(1), persistent=False)
    internals.buffers_of(module)["kept"] = torch.ones(1)
    assert module.get_buffer("kept") == 1
    saved = {name for name in internals.buffers_of(module) if internals.is_saved(module, name)}
    assert saved == module.state_dict().keys()


@pytest.mark.parametrize("padding", [(1, 2), "same", "valid"])
def test_padding_is_spelled_out_for_both_axes(padding: Any) -> None:
    conv = nn.Conv2d(1, 1, (3, 5), padding=padding, dilation=(2, 1))
    rows, columns = internals.padding_of_axes(conv)
    x = torch.randn(1, 1, 9, 9)
    padded = F.pad(x, (columns, columns, rows, rows))
    torch.testing.assert_close(conv(x), F.conv2d(padded, conv.weight, conv.bias, dilation=(2, 1)))


def test_writing_is_counted_and_views_know_their_base() -> None:
    x = torch.zeros(2)
    before = internals.version(x)
    view = x[:1]
    view.add_(1)
    assert internals.version(x) == before + 1
    assert internals.base_of(view) is x
    assert internals.base_of(x) is x


def test_gradient_hooks_of_a_tensor_are_noticed() -> None:
    x = torch.zeros(2, requires_grad=True)
    assert not internals.has_gradient_hooks(x)
    x.register_hook(lambda grad: None)
    assert internals.has_gradient_hooks(x)


def test_operators_that_write_are_told_from_others() -> None:
    assert internals.writes_in_place(torch.ops.aten.add_.Tensor)
    assert not internals.writes_in_place(torch.ops.aten.add.Tensor)
