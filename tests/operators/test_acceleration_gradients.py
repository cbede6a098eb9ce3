"""Accelerated networks train as they would have: gradients by name, in float64, in training mode.

The oracle is a copy of the network as it was. Every network here has two fusions: one is clean, so
that something is fused in any case; what happens to the map of the other must not change a number.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import seglab
from seglab.operators.acceleration import Acceleration, CannotAccelerateError
from seglab.operators.lazy_mode import LazyResizing
from seglab.operators.lazy_tensor import LazyTensor, LazyTensorError

IMAGE = torch.arange(2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16).sin()
Pair = tuple[Tensor, Tensor]


def accelerate(model: nn.Module, example: Any = IMAGE) -> Acceleration:
    return seglab.accelerate(model, example, force="fused", min_gain=0, repeats=1)


def upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(16, 16), mode="bilinear")


class Net(nn.Module):
    """A clean fusion, then one whose maps pass `between`; `after` picks the outputs."""

    def __init__(
        self,
        between: Callable[[Tensor, Tensor], Pair] = lambda fine, up: (fine, up),
        after: Callable[[Tensor, Tensor], Any] = lambda y, up: y,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.clean = nn.Conv2d(6, 4, 3, padding=1)
        self.low = nn.Conv2d(4, 4, 1)
        self.fuse = nn.Conv2d(8, 4, 3, padding=1)
        self.between, self.after = between, after
        self.double()

    def forward(self, image: Tensor) -> Any:
        fine = self.clean(torch.cat([image, upsampled(image[..., ::2, ::2])], dim=1))
        up = self.resize(self.low(F.avg_pool2d(fine, 2)))
        return self.after(self.fuse(torch.cat(self.between(fine, up), dim=1)), up)

    def resize(self, x: Tensor) -> Tensor:
        return upsampled(x)


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif dataclasses.is_dataclass(output):
        yield from tensors([getattr(output, f.name) for f in dataclasses.fields(output)])
    else:
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.train().zero_grad()
    torch.stack([x.sin().sum() for x in tensors(model(IMAGE))]).sum().backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(found: nn.Module, plain: nn.Module) -> None:
    expected = gradients(plain)
    got = {name.removeprefix("module."): x for name, x in gradients(found).items()}
    assert list(got) == list(expected)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-11 * scale, msg=name)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def squared(x: Tensor) -> Tensor:
    return x * x


def through_script(fine: Tensor, up: Tensor) -> Pair:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fine, torch.jit.script(squared)(up)


def looked_at(fine: Tensor, up: Tensor) -> Pair:
    with torch.no_grad():
        up.mean()
    return fine, up


def looked_at_in_inference_mode(fine: Tensor, up: Tensor) -> Pair:
    with torch.inference_mode():
        up.mean()
    return fine, up


def tripled_gradient(fine: Tensor, up: Tensor) -> Pair:
    if up.requires_grad:
        up.register_hook(lambda grad: 3 * grad)
    return fine, up


def multiplied_after_detour(fine: Tensor, up: Tensor) -> Pair:
    same = up.contiguous()
    same.mul_(fine)
    return up, same


BETWEEN: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "read without grad": looked_at,
    "read in inference mode": looked_at_in_inference_mode,
    "autograd function": lambda fine, up: (fine, Double.apply(up)),
    "autograd function in training": lambda fine, up: (
        (fine, Double.apply(up)) if up.requires_grad else (fine, 2 * up)
    ),
    "beside an autograd function": lambda fine, up: (fine + Double.apply(up), up),
    "re-entrant checkpoint": lambda fine, up: (fine, checkpoint(torch.sin, up, use_reentrant=True)),
    "checkpoint": lambda fine, up: (fine, checkpoint(torch.sin, up, use_reentrant=False)),
    "scripted function": through_script,
    "vmap": lambda fine, up: (fine, torch.func.vmap(torch.sin)(up)),
    "tensor hook": tripled_gradient,
    "written in place": lambda fine, up: (fine, up.mul_(fine)),
    "written in place elsewhere": multiplied_after_detour,
    "a view written in place": lambda fine, up: (
        up[:, :2].mul_(2),
        torch.cat([fine, up[:, :2]], 1),
    ),
    "detached": lambda fine, up: (fine + up.detach(), up),
    "added after concatenation": lambda fine, up: (torch.cat([fine[:, :0], up], 1), fine + up),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of inference
def test_what_reads_a_map_keeps_its_gradient(name: str) -> None:
    model = Net(BETWEEN[name])
    plain = copy.deepcopy(model)
    done = accelerate(model)
    assert "clean" in [layer.name for layer in done.layers]
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("name", ["autograd function", "scripted function", "vmap"])
def test_readers_below_python_are_differentiated_twice(name: str) -> None:
    model = Net(BETWEEN[name])
    image = IMAGE.clone().requires_grad_()

    def second() -> Tensor:
        (first,) = torch.autograd.grad(model(image).sin().sum(), image, create_graph=True)
        return torch.autograd.grad(first.square().sum(), image)[0]

    expected = second()
    with LazyResizing("fused"):
        found = second()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


class WithoutGrad(Net):
    def resize(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return upsampled(x)


def test_map_upsampled_without_grad_gains_none() -> None:
    model = WithoutGrad()
    plain = copy.deepcopy(model)
    accelerate(model)
    assert not any(name.startswith("low") for name in gradients(model))
    assert_same_gradients(model, plain)


def gradient_of_map(y: Tensor, up: Tensor) -> Tensor:
    if not up.requires_grad:
        return y
    return y + torch.autograd.grad(y.sin().sum(), up, create_graph=True)[0]


def retained(y: Tensor, up: Tensor) -> Tensor:
    if up.requires_grad:
        up.retain_grad()
    return y


class Outputs(NamedTuple):
    y: Tensor
    up: Any


@dataclasses.dataclass(frozen=True)
class Fields:
    y: Tensor
    up: Any


class OwnDict(OrderedDict):  # type: ignore[type-arg]
    pass


AFTER: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "gradient of the map": gradient_of_map,
    "retained gradient": retained,
    "in a named tuple": Outputs,
    "in a dataclass": Fields,
    "in nested ones": lambda y, up: [Outputs(y, {"up": (Fields(y, up),)})],
    "in a dict of another type": lambda y, up: OwnDict(y=y, up=up),
    "read afterwards": lambda y, up: y + up,
}


@pytest.mark.parametrize("name", AFTER)
def test_maps_used_after_the_convolution_are_ordinary(name: str) -> None:
    model = Net(after=AFTER[name])
    plain = copy.deepcopy(model)
    accelerate(model)
    assert_same_gradients(model, plain)
    assert {type(x) for x in tensors(model(IMAGE))} == {Tensor}


def test_gradients_of_returned_maps_are_whole() -> None:
    model = Net(after=Outputs)
    plain = copy.deepcopy(model)
    accelerate(model)
    found, expected = (
        torch.autograd.grad(out.y.sin().sum(), out.up)[0] for out in (model(IMAGE), plain(IMAGE))
    )
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "ask",
    [
        lambda up: up.retain_grad(),
        lambda up: up.register_hook(lambda grad: None),
        lambda up: up.grad_fn,
        lambda up: torch.autograd.grad(up.sum(), up),
        lambda up: setattr(up, "requires_grad", True),
    ],
)
def test_lazy_maps_refuse_to_tell_their_gradient(ask: Callable[[Tensor], Any]) -> None:
    with LazyResizing("fused"), pytest.raises(LazyTensorError, match="gradient of an upsampled"):
        ask(upsampled(IMAGE[..., ::2, ::2].clone().requires_grad_()))


def test_lazy_map_has_the_attributes_of_the_map() -> None:
    x = IMAGE[..., ::2, ::2].clone().requires_grad_()
    with LazyResizing():
        up = upsampled(x)
        assert isinstance(up, LazyTensor)
        assert up.requires_grad
        assert not up.is_leaf
        with torch.no_grad():
            assert not upsampled(x).requires_grad


def monitored(model: nn.Module) -> None:
    def look(module: nn.Module, inputs: Any) -> None:
        with torch.no_grad():
            inputs[0].mean()

    model.get_submodule("fuse").register_forward_pre_hook(look)


LATER: dict[str, Callable[[nn.Module], Any]] = {
    "monitor": monitored,
    "forward hook": lambda m: m.fuse.register_forward_hook(lambda _, x, y: y + 0 * x[0][:, :4]),
    "full backward hook": lambda m: m.fuse.register_full_backward_hook(lambda *_: None),
    "full backward pre-hook": lambda m: m.fuse.register_full_backward_pre_hook(lambda *_: None),
    "retained in a hook": lambda m: m.fuse.register_forward_hook(
        lambda _, x, y: x[0].retain_grad()
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_hooks_added_later_let_it_run_as_it_was(name: str) -> None:
    model = Net()
    plain = copy.deepcopy(model)
    accelerate(model)
    LATER[name](model)
    LATER[name](plain)
    with pytest.warns(UserWarning, match="other hooks or other modules in training mode"):
        assert_same_gradients(model, plain)


class HookedAtFirstUse(Net):
    """Registers a hook of its own in its first forward pass, as transformers' networks do."""

    def forward(self, x: Tensor) -> Any:
        if not self.fuse._forward_hooks:
            self.fuse.register_forward_hook(lambda module, args, output: None)
        return super().forward(x)


def test_hooks_that_the_first_pass_registers_are_checked() -> None:
    seen: list[type] = []
    model = HookedAtFirstUse(lambda fine, up: (seen.append(type(up)), (fine, up))[1])
    plain = copy.deepcopy(model)
    accelerate(model)
    assert not model.fuse._forward_hooks
    seen.clear()
    for _ in range(3):  # warnings are errors
        assert_same_gradients(model, plain)
    assert seen.count(LazyTensor) == 3
    monitored(model)
    with pytest.warns(UserWarning, match="other hooks or other modules in training mode"):
        model(IMAGE)


def test_hook_put_in_the_place_of_another_is_noticed() -> None:
    model = Net()
    handle = model.fuse.register_forward_hook(lambda module, args, output: None)
    accelerate(model)
    handle.remove()
    model.fuse.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match="other hooks or other modules in training mode"):
        model(IMAGE)


@pytest.mark.parametrize("name", ["monitor", "forward hook", "full backward hook"])
def test_hooks_there_before_are_part_of_the_check(name: str) -> None:
    model = Net()
    LATER[name](model)
    plain = copy.deepcopy(model)
    accelerate(model)
    assert_same_gradients(model, plain)


def test_modes_that_were_not_checked_run_as_they_were() -> None:
    model = Net()
    accelerate(model)
    seen: list[type] = []
    model.between = lambda fine, up: (seen.append(type(up)), (fine, up))[1]
    model.train()(IMAGE)  # warnings are errors
    model.eval()(IMAGE)
    assert seen == [LazyTensor, LazyTensor]
    model.fuse.train()
    with pytest.warns(UserWarning, match="Call `accelerate` again"):
        model(IMAGE)
    assert seen[-1] is Tensor
    accelerate(model)
    model(IMAGE)
    assert seen[-1] is LazyTensor


def test_error_in_training_alone_is_found() -> None:
    def wrong_in_training(fine: Tensor, up: Tensor) -> Pair:
        if isinstance(up, LazyTensor) and fine.requires_grad and wrong_in_training.module.training:
            return fine.detach(), up
        return fine, up

    model = Net(wrong_in_training)
    wrong_in_training.module = model  # type: ignore[attr-defined]
    model.train()
    with pytest.raises(CannotAccelerateError, match=r"gradient of clean.* in training"):
        accelerate(model)


def test_gradient_lost_from_a_small_tensor_is_found() -> None:
    class Small(Net):
        """A parameter whose gradient is a billionth of the others', lost when accelerated."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, image: Tensor) -> Any:
            up = upsampled(image[..., ::2, ::2])
            scale = self.scale.detach() * 0.5 + self.scale * 0.5
            scale = scale if type(up) is LazyTensor else self.scale
            return super().forward(image) + 1e-9 * scale

    model = Small().float()
    with pytest.raises(CannotAccelerateError, match=r"gradient of scale by 5\.0e-01"):
        accelerate(model, IMAGE.float())


@pytest.mark.parametrize("failure", [ValueError, RecursionError, KeyError])
def test_whatever_goes_wrong_in_the_trial_is_a_refusal(failure: type[Exception]) -> None:
    def fails(fine: Tensor, up: Tensor) -> Pair:
        if isinstance(up, LazyTensor):
            raise failure("here")
        return fine, up

    model = Net(fails)
    with pytest.raises(
        CannotAccelerateError, match=f"trial on a copy failed with {failure.__name__}"
    ):
        accelerate(model)
    assert type(model) is Net


def test_checkpoint_around_a_fusion_is_a_refusal() -> None:
    class Recomputing(Net):
        def forward(self, image: Tensor) -> Any:
            return checkpoint(super().forward, image, use_reentrant=False)

    with pytest.raises(CannotAccelerateError, match="trial on a copy failed with CheckpointError"):
        accelerate(Recomputing())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_undo_works_in_any_order(order: tuple[int, int]) -> None:
    model = Net()
    both = [accelerate(model), accelerate(model)]
    both[order[0]].undo()
    assert type(model) is not Net
    both[order[1]].undo()
    assert type(model) is Net
    assert "_accelerations" not in vars(model)
    both[0].undo()


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def shallow(model: nn.Module) -> nn.Module:
    copied = copy.copy(model)
    vars(copied)["_modules"] = copy.deepcopy(model._modules)
    return copied


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fuse = nn.Conv2d(6, 4, 3, padding=1, dtype=torch.float64)

    def forward(self, image: Tensor) -> Any:
        self.seen = torch.cat([image, upsampled(image[..., ::2, ::2])], dim=1)
        return self.fuse(self.seen)


@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle, shallow])
def test_copies_are_their_own(how: Callable[[nn.Module], nn.Module]) -> None:
    model = Plain()
    accelerate(model)
    copied = how(model)
    with torch.no_grad():
        copied.get_submodule("fuse").weight.zero_()
    assert isinstance(copied, Plain)
    assert float(copied(IMAGE).detach().std(dim=(0, 2, 3)).max()) == 0
    assert float(model(IMAGE).detach().std()) > 0
    assert isinstance(copied.seen, LazyTensor)  # accelerated as well
    torch.testing.assert_close(copied.seen.sum(), model.seen.sum())


@pytest.mark.parametrize(
    "fuse",
    [
        lambda x, up: torch.cat([x[:1], up], dim=1),
        lambda x, up: torch.cat([x[0], up], dim=1),
        lambda x, up: F.conv2d(up, torch.ones(1, 2, 1, 1).double()),
        lambda x, up: F.interpolate(x, size=(4, 4), scale_factor=2),
        lambda x, up: F.interpolate(x, size=(4, 4), mode="nearest", align_corners=False),
        lambda x, up: F.interpolate(x, size=(4, 4, 4)),
    ],
)
def test_wrong_arguments_raise_as_in_torch(fuse: Callable[[Tensor, Tensor], Any]) -> None:
    low = IMAGE[..., ::2, ::2]
    with pytest.raises((RuntimeError, ValueError)) as plain:
        fuse(IMAGE, upsampled(low))
    with LazyResizing("fused"), pytest.raises(plain.type) as lazy:
        fuse(IMAGE, upsampled(low))
    assert str(lazy.value) == str(plain.value)


def test_unseen_write_in_inference_mode_changes_nothing() -> None:
    class Writes(Plain):
        def forward(self, image: Tensor) -> Any:
            low = image[..., ::2, ::2].contiguous()
            both = torch.cat([image, upsampled(low)], dim=1)
            with torch._C.DisableTorchFunction():
                low.mul_(2)
            return self.fuse(both)

    model = Writes()
    with torch.inference_mode():
        expected = model(IMAGE)
        with LazyResizing("fused") as mode:
            found = model(IMAGE)
    assert mode.fused
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.fixture
def process_group() -> Iterator[None]:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel_trains_the_same(option: str, inside: bool) -> None:
    model = Net(after=Outputs)
    plain = copy.deepcopy(model)
    if inside:
        accelerate(model)
    wrapped = nn.parallel.DistributedDataParallel(model, **{option: True})
    if not inside:
        try:
            accelerate(wrapped)
        except CannotAccelerateError:
            return
    for _ in range(2):
        assert_same_gradients(wrapped, plain)


@pytest.mark.slow
def test_monitored_segformer_keeps_all_its_gradients() -> None:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = smp.create_model("Segformer", "mit_b0", encoder_weights=None).double()
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain = copy.deepcopy(model)
    accelerate(model, image)
    results = []
    for network in (model, plain):
        torch.manual_seed(1)
        network.train()(image).sin().sum().backward()
        results.append({n: x.grad for n, x in network.named_parameters() if x.grad is not None})
    assert len(results[0]) == 189
    expected = results[1]
    assert list(results[0]) == list(expected)
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, x in results[0].items():
        torch.testing.assert_close(x, expected[name], rtol=1e-8, atol=1e-13 * largest, msg=name)
