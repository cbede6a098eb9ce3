"""Streamed windows against whole-image sums, pixel loops, and the allocator's own records."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from torch import Tensor, nn

import seglab
from seglab.inference import Inference, slide
from seglab.large_images import WindowStream


class InMemory:
    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.shape = pixels, pixels.shape[:2]

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        return self.pixels[rows, columns]


class WindowNet(nn.Module):
    """Sees the window's own mean and its place inside, so grid and weights matter."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = image.float() / 255
        return self.conv(x) + self.conv(x).mean(dim=(2, 3), keepdim=True)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return WindowNet().eval()


def brute_force(network: nn.Module, pixels: np.ndarray, crop: tuple, stride: tuple) -> np.ndarray:
    """Gaussian mean at each pixel in float64, by asking every window whether it holds the pixel."""
    height, width = pixels.shape[:2]
    size = min(crop[0], height), min(crop[1], width)
    tops = sorted({min(y, height - size[0]) for y in range(0, height, stride[0])})
    lefts = sorted({min(x, width - size[1]) for x in range(0, width, stride[1])})
    out = np.zeros((4, height, width))
    answers = {}
    for top in tops:
        for left in lefts:
            window = pixels[top : top + size[0], left : left + size[1]].transpose(2, 0, 1)
            with torch.no_grad():
                answers[top, left] = network(torch.from_numpy(window.copy())[None])[0].numpy()
    for y in range(height):
        for x in range(width):
            above, below = np.zeros(4), 0.0
            for (top, left), logits in answers.items():
                if top <= y < top + size[0] and left <= x < left + size[1]:
                    dy = (y - top - (size[0] - 1) / 2) / (size[0] / 8)
                    dx = (x - left - (size[1] - 1) / 2) / (size[1] / 8)
                    weight = np.exp(-(dy**2 + dx**2) / 2)
                    above += weight * logits[:, y - top, x - left]
                    below += weight
            out[:, y, x] = above / below
    return out


SHAPES = [(23, 31), (8, 40), (5, 7), (30, 9), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_blending_equals_a_loop_over_pixels(network: nn.Module, shape: tuple) -> None:
    pixels = noise(*shape)
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        found = slide(network, image, (8, 10), (5, 6), "gaussian")[0].numpy()
    np.testing.assert_allclose(found, brute_force(network, pixels, (8, 10), (5, 6)), atol=1e-5)


@pytest.mark.parametrize("blend", ["uniform", "gaussian"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_panels_leave_no_seam(
    network: nn.Module, shape: tuple, blend: str, batch_size: int
) -> None:
    pixels = noise(*shape)
    rule = Inference((8, 10), (5, 6), blend=blend)  # type: ignore[arg-type]
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        expected = rule(network, image, shape).argmax(1)[0].numpy()
    for columns in (10, 13, 10_000):
        memory = 4 * 7 * min(8, shape[0]) * columns
        stream = WindowStream(
            network, 4, rule, torch.device("cpu"), memory=memory, batch_size=batch_size
        )
        found = np.full(shape, 99, np.uint8)
        stream(InMemory(pixels), found)
        n_panels = len(list(stream.panels(*shape)))
        assert n_panels == -(-shape[1] // columns)
        assert (found == expected).mean() == 1


def peak_bytes(run, *args: object) -> tuple[int, int]:
    """Peaks of torch's CPU allocator, by its own records, and of numpy's memory."""
    tracemalloc.start()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run(*args)
    numpys = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    records = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in records if e.name() == "[memory]"]
    assert changes
    live = np.cumsum([n_bytes for _, n_bytes in sorted(changes)])
    return int(live.max()), numpys


def test_memory_does_not_grow_with_the_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = WindowNet(40).eval()
    memory = 4 * 43 * 16 * 40
    stream = WindowStream(network, 40, Inference((16, 16)), torch.device("cpu"), memory=memory)
    peaks = []
    for side in (64, 256):
        image = InMemory(np.broadcast_to(np.uint8(9), (side, side, 3)))
        out = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (side, side))
        peaks.append(peak_bytes(stream, image, out))
    window = 40 * 16 * 16 * 4
    for torchs, _ in peaks:
        assert torchs < memory + 8 * window  # the sums, and what the toy makes of one window
    whole = 41 * 256 * 256 * 4
    assert peaks[1][0] < whole / 8
    assert peaks[1][1] < 256 * 256  # not even the ids are held at full size by numpy


def test_too_little_memory_is_refused(network: nn.Module) -> None:
    stream = WindowStream(network, 4, Inference((8, 10)), torch.device("cpu"), memory=100)
    with pytest.raises(ValueError, match="allow at least 2240"):
        stream(InMemory(noise(20, 20)), np.zeros((20, 20), np.uint8))


@pytest.mark.parametrize("rule", [Inference(), Inference((8, 8), flip=True)])
def test_rules_that_need_the_whole_image_are_refused(network: nn.Module, rule: Inference) -> None:
    with pytest.raises(ValueError, match=r"give a window, such as \(1024, 1024\)"):
        WindowStream(network, 4, rule, torch.device("cpu"))


def test_mask_is_a_tiled_file_with_georeference(fitted: Path, tmp_path: Path) -> None:
    pixels = noise(300, 570)
    scale = (33550, "d", 3, (0.5, 0.5, 0.0), True)
    keys = (34735, "H", 8, (1, 1, 0, 1, 1024, 0, 1, 1), True)
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, tile=(64, 64), compression="zlib", extratags=[scale, keys]
    )
    model = seglab.load(fitted / "checkpoints/last.ckpt", device="cpu")
    steps: list[tuple[int, int]] = []
    path = model.predict_large(
        tmp_path / "a.tif",
        tmp_path / "out/ids.tif",
        window=(64, 96),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps[-1][0] == steps[-1][1] == sum(1 for _ in range(7 * 9))
    image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        expected = slide(model.task.network, image, (64, 96)).argmax(1)[0].numpy()
    assert (tifffile.imread(path) == expected).all()
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert (page.is_tiled, page.tags[33550].value) == (True, (0.5, 0.5, 0.0))
        assert page.tags[34735].value == (1, 1, 0, 1, 1024, 0, 1, 1)
        assert (model.palette == page.colormap[:, :8].T // 257).all()
    assert [item.name for item in path.parent.iterdir()] == ["ids.tif"]


def test_large_prediction_needs_a_window_and_a_tiff(fitted: Path, tmp_path: Path) -> None:
    model = seglab.load(fitted / "checkpoints/last.ckpt", device="cpu")
    with pytest.raises(ValueError, match="give a window"):
        model.predict_large("a.tif", tmp_path / "b.tif")
    with pytest.raises(ValueError, match=r"b\.png: large masks are tiled TIFF"):
        model.predict_large("a.tif", tmp_path / "b.png", window=(8, 8))
    with pytest.raises(ValueError, match=r"cannot decode .*a\.tif"):
        model.predict_large(tmp_path / "a.tif", tmp_path / "b.tif", window=(8, 8))
    model.eval_scale = (64, 32)
    with pytest.raises(ValueError, match=r"resized to fit \(64, 32\)"):
        model.predict_large("a.tif", tmp_path / "b.tif")


def test_progress_counts_each_image_from_nothing(network: nn.Module) -> None:
    steps: list[tuple[int, int]] = []
    stream = WindowStream(
        network,
        4,
        Inference((8, 8), (8, 8)),
        torch.device("cpu"),
        progress=lambda done, total: steps.append((done, total)),
    )
    for _ in range(2):
        stream(InMemory(noise(16, 24)), np.zeros((16, 24), np.uint8))
    assert steps == [(3, 6), (6, 6)] * 2
