"""Peak memory and time of labelling one large image by windows.

python benchmarks/large_image.py --side 20000 --classes 19
python benchmarks/large_image.py --side 20000 --ckpt_path best.ckpt

Without a checkpoint the network is one convolution, so that the figures are those of streaming. The
picture, a tiled TIFF of noise, and the mask are written to a temporary folder (1.6 GB at 20,000).
"""

from __future__ import annotations

import resource
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tifffile
import torch

import seglab
from seglab.data.sources.reading import ImageFormat
from seglab.data.sources.regions import Regions
from seglab.inference import Inference
from seglab.large_images import WindowStream, label_to_tiff
from seglab.visualize import color_table

TILE = 512


class _OneLayer(torch.nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, num_classes, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conv(image.float() / 255)


def main() -> None:
    """Write the picture, label it, print what it took."""
    options = _read_options()
    with TemporaryDirectory(dir=options.folder) as folder:
        source, output = Path(folder, "image.tif"), Path(folder, "ids.tif")
        _write_noise(source, options.side)
        before, started = _peak_gib(), time.perf_counter()
        _label(source, output, options)
        seconds = time.perf_counter() - started
        with tifffile.TiffFile(output) as file:
            assert file.pages[0].shape == (options.side, options.side)
        pixels = options.side**2 / 1e6
        print(f"{options.side} x {options.side}: {seconds:.0f} s, {pixels / seconds:.2f} MP/s")
        print(f"peak resident memory {_peak_gib():.2f} GiB, {before:.2f} before")


def _label(source: Path, output: Path, options: Namespace) -> None:
    window = (options.window, options.window)
    memory = int(options.memory * 2**30)
    if options.ckpt_path:
        model = seglab.load(options.ckpt_path)
        model.predict_large(source, output, window=window, memory=memory)
        return
    network = _OneLayer(options.classes).eval()
    rule = Inference(window)
    stream = WindowStream(network, options.classes, rule, torch.device("cpu"), memory)
    colors = color_table(None, options.classes)
    label_to_tiff(stream, Regions(source, ImageFormat()), output, colors, source)


def _write_noise(path: Path, side: int) -> None:
    random = np.random.default_rng(0)
    n_tiles = -(-side // TILE)

    def tiles() -> Iterator[np.ndarray]:
        for _ in range(n_tiles**2):
            yield random.integers(0, 256, (TILE, TILE, 3), np.uint8)

    shape = (side, side, 3)
    tifffile.imwrite(path, tiles(), shape=shape, dtype=np.uint8, tile=(TILE, TILE))


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _read_options() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--memory", type=float, default=1.0, help="GiB for the sums of logits")
    parser.add_argument("--ckpt_path")
    parser.add_argument("--folder", help="where the temporary files go")
    return parser.parse_args()


if __name__ == "__main__":
    main()
