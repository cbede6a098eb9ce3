"""Packed convolutions compute what plain ones do, also where the packed weight does not apply."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seglab.operators.packing import PackedConv2d, pack_convolutions_
from seglab.torch_internals import is_packing_possible

pytestmark = pytest.mark.skipif(not is_packing_possible(), reason="this torch has no packing")


def pack(network: nn.Module, x: Tensor) -> tuple[nn.Module, tuple[int, int]]:
    packed = copy.deepcopy(network).eval().requires_grad_(False)
    return packed, pack_convolutions_(packed, x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"stride": 2, "padding": 1},
        {"padding": (2, 1), "dilation": (2, 1)},
        {"padding": "same", "dilation": 3},
        {"groups": 4},
    ],
    ids=str,
)
def test_packed_convolution_equals_plain(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, **options)  # type: ignore[arg-type]
    x = torch.randn(2, 8, 11, 9)
    packed, counts = pack(nn.Sequential(conv, nn.ReLU()), x)
    assert counts == (1, 1)
    expected = F.relu(conv(x)).detach()
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(packed(image), expected, rtol=1e-5, atol=1e-5)
    other = torch.randn(1, 8, 20, 31)  # packed for another size
    torch.testing.assert_close(packed(other), F.relu(conv(other)), rtol=1e-5, atol=1e-5)


def test_reflected_padding_is_not_packed() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU())
    packed, counts = pack(network, torch.randn(1, 3, 8, 8))
    assert counts == (0, 0)
    assert type(packed[1]) is nn.ReLU


def test_relu_of_a_sum_stays() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.relu(self.conv(x)) - x)

    torch.manual_seed(0)
    network, x = Residual(), torch.randn(1, 3, 8, 8)
    packed, counts = pack(network, x)
    assert counts == (1, 0)
    torch.testing.assert_close(packed(x), network(x), rtol=1e-5, atol=1e-5)


def test_weight_written_later_counts() -> None:
    x = torch.randn(1, 3, 8, 8)
    packed, _ = pack(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    packed(x)
    for change in ("copy_", "data", "load_state_dict"):
        new = torch.randn(4, 3, 3, 3)
        if change == "copy_":
            packed[0].weight.copy_(new)
        elif change == "data":
            packed[0].weight.data = new
        else:
            packed.load_state_dict({"0.weight": new, "0.bias": packed[0].bias})
        expected = F.conv2d(x, new, packed[0].bias)
        torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)


def test_other_surroundings_take_the_plain_weight() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    packed, _ = pack(nn.Sequential(conv, nn.ReLU()), x)
    expected = F.relu(conv(x)).detach()
    doubled = copy.deepcopy(packed).double()
    torch.testing.assert_close(doubled(x.double()), expected.double(), rtol=1e-5, atol=1e-5)
    again = pickle.loads(pickle.dumps(packed))
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)
    image = x.clone().requires_grad_()
    packed(image).sum().backward()
    assert image.grad is not None
    program = torch.export.export(packed, (x,)).module()
    torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
    assert packed(x[:0]).shape == (0, 4, 6, 6)
    assert isinstance(packed[0], PackedConv2d)


def test_weight_written_behind_torch_is_seen() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()).eval().requires_grad_(False)
    x = torch.randn(1, 4, 9, 9)
    pack_convolutions_(network, x)
    network(x)
    network[0].weight.data.mul_(2)
    expected = F.conv2d(x, network[0].weight, network[0].bias).relu()
    torch.testing.assert_close(network(x), expected)
    network[0].weight.numpy()[:] += 1
    expected = F.conv2d(x, network[0].weight, network[0].bias).relu()
    torch.testing.assert_close(network(x), expected)


def test_weight_of_inference_mode_may_change() -> None:
    with torch.inference_mode():
        network, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(1, 3, 9, 9)
        pack_convolutions_(network, x)
        network(x)
        network[0].weight[0, 0, 0, 1] = 5.0
        expected = F.conv2d(x, network[0].weight, network[0].bias)
        torch.testing.assert_close(network(x), expected)


def test_relu_with_patched_forward_stays() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval().requires_grad_(False)
    network[1].forward = lambda x: x.clamp(-0.1, 0.1)
    x = torch.randn(1, 3, 4, 4)
    expected = network(x)
    assert pack_convolutions_(network, x) == (1, 0)
    torch.testing.assert_close(network(x), expected)
