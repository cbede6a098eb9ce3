"""Sliding windows and test-time augmentation against loops over single pixels and views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seglab.inference import Inference


@pytest.fixture
def network() -> nn.Module:
    """Not translation-equivariant (the window's own mean enters), so the grid matters."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.sizes: list[tuple[int, int]] = []

        def forward(self, image: Tensor) -> Tensor:
            self.sizes.append(tuple(image.shape[-2:]))
            x = image.float() / 255
            return self.conv(x) + x.mean(dim=(1, 2, 3), keepdim=True)

    torch.manual_seed(0)
    return Net().eval()


def image(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)


def grid(length: int, crop: int, stride: int) -> list[int]:
    """Starts of the windows, by walking: step until the end is reached, then step back inside."""
    starts = [0]
    while starts[-1] + crop < length:
        starts.append(starts[-1] + stride)
    return [max(0, min(start, length - crop)) for start in starts]


def brute_force(network: nn.Module, x: Tensor, crop: tuple, stride: tuple) -> np.ndarray:
    """Each pixel: mean over the windows that hold it, found by asking each window."""
    height, width = x.shape[-2:]
    answers = []
    for top in grid(height, crop[0], stride[0]):
        for left in grid(width, crop[1], stride[1]):
            window = x[:, :, top : top + crop[0], left : left + crop[1]]
            answers.append((top, left, network(window).double().numpy()))
    out = np.zeros((2, 4, height, width))
    for row in range(height):
        for column in range(width):
            seen = [
                logits[:, :, row - top, column - left]
                for top, left, logits in answers
                if 0 <= row - top < logits.shape[2] and 0 <= column - left < logits.shape[3]
            ]
            out[:, :, row, column] = np.mean(seen, axis=0)
    return out


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((11, 13), (5, 6), (3, 4)),
        ((10, 12), (5, 6), (5, 6)),
        ((5, 17), (8, 8), (5, 5)),
        ((4, 4), (8, 8), (5, 5)),
        ((9, 9), (9, 4), (9, 1)),
    ],
)
@torch.no_grad()
def test_sliding_equals_brute_force(
    network: nn.Module, size: tuple, crop: tuple, stride: tuple
) -> None:
    x = image(*size)
    found = Inference(crop, stride)(network, x, size)
    np.testing.assert_allclose(found.numpy(), brute_force(network, x, crop, stride), atol=1e-5)


@torch.no_grad()
def test_default_stride_is_two_thirds_of_the_window(network: nn.Module) -> None:
    x = image(20, 20)
    expected = brute_force(network, x, (12, 9), (8, 6))
    np.testing.assert_allclose(
        Inference((12, 9))(network, x, (20, 20)).numpy(), expected, atol=1e-5
    )


@torch.no_grad()
def test_whole_image_gives_the_plain_logits_at_the_asked_size(network: nn.Module) -> None:
    x = image(8, 10)
    assert torch.equal(Inference()(network, x, (8, 10)), network(x))
    expected = F.interpolate(network(x), size=(21, 17), mode="bilinear", align_corners=False)
    assert torch.equal(Inference()(network, x, (21, 17)), expected)


@torch.no_grad()
def test_views_average_softmax_at_the_final_size(network: nn.Module) -> None:
    x, size = image(8, 10), (16, 20)
    views = []
    for scale in (0.5, 1.0, 1.75):
        scaled_size = (round(8 * scale), int(10 * scale + 0.5))
        scaled = F.interpolate(x.float(), size=scaled_size, mode="bilinear")
        for mirrored in (False, True):
            logits = network(scaled.flip(3)).flip(3) if mirrored else network(scaled)
            views.append(F.interpolate(logits, size=size, mode="bilinear").softmax(1))
    found = Inference(scales=(0.5, 1.0, 1.75), flip=True)(network, x, size)
    torch.testing.assert_close(found, torch.stack(views).mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(2, *size))


@torch.no_grad()
def test_scaled_views_are_cut_into_windows_of_the_same_size(network: nn.Module) -> None:
    Inference(crop_size=(6, 6), scales=(1.0, 2.0))(network, image(9, 9), (9, 9))
    assert set(network.sizes) == {(6, 6)}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"stride": (2, 2)}, "needs a crop_size"),
        ({"crop_size": (4, 4), "stride": (2, 5)}, "left out"),
        ({"crop_size": (4, 4), "stride": (5, 2)}, "left out"),
        ({"crop_size": (4, 4), "stride": (0, 2)}, "at least 1"),
        ({"scales": ()}, "at least one factor"),
        ({"scales": (1.0, 0.0)}, "above 0"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Inference(**arguments)


def test_views_are_averaged_in_float32_whatever_the_networks_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(150, 3, 3, 3, generator=generator)
    image = torch.randint(0, 256, (1, 3, 64, 64), generator=generator)

    def half(x: Tensor) -> Tensor:
        return F.conv2d(x.float() / 100, weight, padding=1).bfloat16()

    found = Inference(flip=True)(half, image, (64, 64))
    exact = Inference(flip=True)(lambda x: half(x).double(), image, (64, 64))
    assert found.dtype == torch.float32
    assert torch.equal(found.argmax(1), exact.argmax(1))
