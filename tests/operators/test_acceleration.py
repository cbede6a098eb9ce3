"""`seglab.accelerate` on other people's networks, and what it must not get wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import seglab
from seglab.operators import lazy_mode
from seglab.operators.acceleration import Acceleration, CannotAccelerateError
from seglab.operators.lazy_mode import LazyResizing
from seglab.operators.lazy_tensor import LazyTensor, LazyTensorError


def force(model: nn.Module, example: Any, **options: Any) -> Acceleration:
    return seglab.accelerate(model, example, force="fused", min_gain=0, repeats=1, **options)


def smp(name: str) -> nn.Module:
    import segmentation_models_pytorch

    return segmentation_models_pytorch.create_model(name, "resnet18", encoder_weights=None)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        pytest.param(
            "UPerNet",
            {"decoder.psp.out_conv.0": 4, "decoder.fusion_block.0": 3},
            marks=pytest.mark.slow,
        ),
        ("PSPNet", {"decoder.conv.0": 4}),
        pytest.param("DeepLabV3Plus", {"decoder.aspp.0.project.0": 1}, marks=pytest.mark.slow),
        pytest.param(
            "Unet",
            {f"decoder.blocks.{level}.conv1.0": 1 for level in range(5)},
            marks=pytest.mark.slow,
        ),
        pytest.param("Segformer", {"decoder.fuse_stage.0": 4}, marks=pytest.mark.slow),
    ],
)
def test_networks_of_smp_are_fused_and_equal(name: str, layers: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, image = smp(name), torch.randn(2, 3, 64, 96)
    expected = copy.deepcopy(model).eval()(image)
    keys = list(model.state_dict())
    done = force(model, image)
    assert {layer.name: layer.n_branches for layer in done.layers} == layers
    # Gradients of training are in it: over twelve pixels a channel, batch normalization makes much
    # of a last bit of float32 (float64 decides, see below).
    assert done.error < 1e-2
    found = model.eval()(image)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == keys
    exact, exact_image = copy.deepcopy(model).double(), image.double()
    fused = exact(exact_image)
    done.undo()
    plain = copy.deepcopy(model).double().eval()(exact_image)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_outputs_in_mappings_are_ordinary_tensors() -> None:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    torch.manual_seed(0)
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    image = torch.randn(2, 3, 64, 64)
    expected = copy.deepcopy(model).eval()(image)["out"]
    done = force(model, image)
    assert [layer.name for layer in done.layers] == ["classifier.0.project.0"]
    torch.testing.assert_close(model.eval()(image)["out"], expected, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """Upsamples, does `between` to what it has, concatenates and convolves."""

    def __init__(self, between: Callable[..., Any] = lambda fine, up: (fine, up)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.fuse = nn.Conv2d(8, 4, 3, padding=1)
        self.between = between

    def forward(self, image: Tensor) -> Any:
        fine = self.stem(image)
        up = F.interpolate(F.avg_pool2d(fine, 2), scale_factor=2, mode="bilinear")
        return self.fuse(torch.cat(self.between(fine, up), dim=1))


IMAGE = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()


def assert_same(model: nn.Module) -> None:
    expected = model(IMAGE)
    with LazyResizing("fused"):
        found = model(IMAGE)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def is_fused(model: nn.Module, image: Tensor = IMAGE) -> bool:
    with LazyResizing("fused") as mode:
        model(image)
    return bool(mode.fused)


@pytest.mark.parametrize(
    "between",
    [
        lambda fine, up: (fine, up.relu()),
        lambda fine, up: (fine + up, up),
        lambda fine, up: (fine, up.add_(1)),
        lambda fine, up: (fine, F.relu(up, inplace=True)),
        lambda fine, up: (up[:, :2], torch.cat([fine, up[:, 2:]], dim=1)),
        lambda fine, up: (F.dropout2d(up, training=False), torch.cat([fine], dim=1)),
        lambda fine, up: (F.interpolate(up, size=(16, 16), mode="nearest"), fine),
        lambda fine, up: (F.interpolate(torch.cat([up[:, :2], fine[:, :2]], 1), (16, 16)), up),
    ],
)
def test_whatever_happens_in_between_gives_the_same(between: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    assert_same(Net(between))


def test_only_what_is_read_elsewhere_is_computed() -> None:
    assert is_fused(Net())
    assert is_fused(Net(lambda fine, up: (fine, F.dropout(up, training=False))))
    assert not is_fused(Net(lambda fine, up: (fine, up.tanh())))


class WritesToSource(nn.Module):
    """Changes a map in place after its upsampling was made lazy."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(6, 4, 3, padding=1)
        self.write = write

    def forward(self, image: Tensor) -> Tensor:
        low = image[:, :, ::2, ::2].contiguous()
        up = F.interpolate(low, size=image.shape[2:], mode="nearest")
        self.write(low)
        y: Tensor = self.fuse(torch.cat([image, up], dim=1))
        return y


@pytest.mark.parametrize(
    "write",
    [
        lambda low: low.mul_(2),
        lambda low: low.__imul__(2),
        lambda low: low.__setitem__((slice(None), 0), 0.0),
        lambda low: low[:, 1:].zero_(),
        lambda low: F.relu(low, True),
        lambda low: torch.add(low, 1, out=low),
    ],
)
def test_writing_to_the_source_of_a_lazy_map_changes_nothing(
    write: Callable[[Tensor], Any],
) -> None:
    assert_same(WritesToSource(write))


class WritesUnseen(nn.Module):
    """Changes the source of a lazy map where no function mode sees it."""

    def __init__(self, before: str) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(6, 4, 3, padding=1)
        self.before = before

    def forward(self, image: Tensor) -> Tensor:
        low = image[:, :, ::2, ::2].contiguous()
        up = F.interpolate(low, size=image.shape[2:], mode="nearest")
        self.write(low, "concatenation")
        both = torch.cat([image, up], dim=1)
        self.write(low, "convolution")
        if self.before == "other reader":
            self.write(low, "other reader")
            both = both.tanh()
        y: Tensor = self.fuse(both)
        return y

    def write(self, low: Tensor, place: str) -> None:
        if place == self.before:
            with torch._C.DisableTorchFunction():
                low.mul_(2)


@pytest.mark.parametrize("before", ["concatenation", "convolution", "other reader"])
def test_unseen_write_is_an_error_and_no_wrong_number(before: str) -> None:
    model = WritesUnseen(before)
    with pytest.raises(LazyTensorError, match="in place between its ups"), LazyResizing("fused"):
        model(IMAGE)


@pytest.mark.parametrize(
    "how",
    [
        {"scale_factor": 1.7, "mode": "bilinear"},  # 8 * 1.7 is no whole size
        {"size": (16, 16), "mode": "bicubic"},
        {"size": (4, 4), "mode": "bilinear", "antialias": True},
        {"size": (16, 16), "mode": "nearest-exact"},
    ],
)
def test_resizing_of_other_kinds_is_left_alone(how: dict[str, Any]) -> None:
    with LazyResizing("fused"):
        assert type(F.interpolate(torch.randn(1, 2, 8, 8), **how)) is Tensor


def test_lazy_maps_survive_leaving_the_network() -> None:
    with LazyResizing():
        up = F.interpolate(torch.ones(1, 2, 4, 4), scale_factor=2)
    assert isinstance(up, LazyTensor)
    assert up.shape == (1, 2, 8, 8)
    assert float(up.sum()) == 128


def test_autocast_is_followed() -> None:
    torch.manual_seed(0)
    model = Net()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(IMAGE)
        with LazyResizing("fused") as mode:
            found = model(IMAGE)
    assert mode.fused
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_undo_restores_and_others_may_watch() -> None:
    torch.manual_seed(0)
    model = Net()
    done = force(model, IMAGE)
    seen: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Watch():
        model(IMAGE)
    assert {"interpolate", "cat", "conv2d"} <= set(seen)
    done.undo()
    assert type(model) is Net


def test_interrupted_pass_leaves_nothing_behind() -> None:
    class Interrupted(Net):
        def forward(self, image: Tensor) -> Any:
            if image.shape[-1] == 8:
                F.interpolate(image, scale_factor=2)
                raise KeyboardInterrupt
            return super().forward(image)

    model = Interrupted()
    force(model, IMAGE)
    with pytest.raises(KeyboardInterrupt):
        model(IMAGE[..., :8])
    assert type(F.interpolate(IMAGE, scale_factor=2)) is Tensor


def test_copies_are_accelerated_by_themselves() -> None:
    torch.manual_seed(0)
    model = Net()
    force(model, IMAGE)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.stem.weight.zero_()
        twin.stem.bias.zero_()
    assert torch.equal(twin(IMAGE), twin.fuse.bias.view(1, 4, 1, 1).expand(2, 4, 16, 16))


def test_training_is_equal_and_buffers_were_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Net(), nn.BatchNorm2d(4)).double()
    before = copy.deepcopy(model)
    force(model, IMAGE.double())
    assert all(torch.equal(x, y) for x, y in zip(model.buffers(), before.buffers(), strict=True))
    for network in (model, before):
        network(IMAGE.double()).pow(3).sum().backward()
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


def test_refusals_say_why() -> None:
    with pytest.raises(CannotAccelerateError, match="none was seen"):
        seglab.accelerate(nn.Conv2d(3, 4, 3), IMAGE)
    with pytest.raises(CannotAccelerateError, match="maps are too small"):
        seglab.accelerate(Net(), IMAGE)
    with pytest.raises(CannotAccelerateError, match=r"less than min_gain=1000"):
        seglab.accelerate(Net(), IMAGE, force="fused", min_gain=1000, repeats=1)


def test_rounding_beyond_the_tolerance_is_told_from_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = {"force": "fused", "tolerance": 0.0, "min_gain": 0, "repeats": 1}
    torch.manual_seed(0)
    done = seglab.accelerate(Net(), IMAGE, **strict)
    assert 0 < done.error < 1e-5

    class InSingle(Net):  # cannot be asked in double precision
        def forward(self, image: Tensor) -> Any:
            return super().forward(image.float())

    with pytest.raises(CannotAccelerateError, match="and not by rounding alone"):
        seglab.accelerate(InSingle(), IMAGE, **strict)

    right = lazy_mode.convolve_branches

    def wrong(*args: Any) -> Any:
        result, fused = right(*args)
        return result * (1 + 1e-6), fused

    monkeypatch.setattr(lazy_mode, "convolve_branches", wrong)
    with pytest.raises(CannotAccelerateError, match="and not by rounding alone"):
        seglab.accelerate(Net(), IMAGE, **strict)

    def not_a_number(*args: Any) -> Any:
        result, fused = right(*args)
        return torch.cat([result[..., :-1], result[..., -1:] * torch.nan], dim=-1), fused

    monkeypatch.setattr(lazy_mode, "convolve_branches", not_a_number)
    with pytest.raises(CannotAccelerateError, match="results would differ, output 0 by inf"):
        seglab.accelerate(Net(), IMAGE, **strict | {"tolerance": 0.1})
