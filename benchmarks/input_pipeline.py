r"""Images per CPU second of the training input, one process: ours, MMSegmentation's, torchvision's.

    python benchmarks/input_pipeline.py

Writes pictures of the three data sets' usual sizes and formats to a temporary folder, then reads
and augments the same files with each pipeline, one thread, interleaved, and prints the best round:
"whole" starts from the files, "transforms" from decoded arrays, "cached" is ours with the decoded
files memory-mapped (data.cache_folder). All give uint8 of the crop's size;
normalization is left out everywhere. MMSegmentation is measured if it can be imported, for instance
from a folder beside this environment:

    pip install --no-deps --target mm mmsegmentation==1.2.2 mmengine mmcv-lite==2.1.0 addict yapf \
        termcolor prettytable ftfy regex platformdirs
    PYTHONPATH=mm python benchmarks/input_pipeline.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from seglab.data.dataset import SegmentationDataset
from seglab.data.scenes import Scenes
from seglab.data.sources.cache import CachedFileSource
from seglab.data.sources.files import FileSource, Item
from seglab.data.sources.labels import LabelTable
from seglab.data.transforms import standard_transforms
from seglab.data.transforms.augment import Augment

Step = Callable[[int], Any]


@dataclass(frozen=True)
class Recipe:
    """What the files look like and what the network gets."""

    name: str
    width: int
    height: int
    suffix: str
    crop: tuple[int, int]  # height, width
    scale: tuple[int, int]  # long, short


RECIPES = (
    Recipe("ADE20K", 683, 512, ".jpg", (512, 512), (2048, 512)),
    Recipe("VOC aug", 500, 375, ".jpg", (512, 512), (2048, 512)),
    Recipe("Cityscapes", 2048, 1024, ".png", (512, 1024), (2048, 1024)),
)


RATIOS = (("ours", "mmseg"), ("cached", "mmseg"), ("ours", "torchvision"))


def write_files(recipe: Recipe, folder: Path, count: int) -> list[Item]:
    """Generated scenes with fine noise, so that they compress about as badly as photographs."""
    items = []
    rng = np.random.default_rng(0)
    for number in range(count):
        image, mask = Scenes(count, size=256, seed=5).read(number)
        image = cv2.resize(image, (recipe.width, recipe.height), interpolation=cv2.INTER_CUBIC)
        noise = rng.normal(0, 4, image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
        mask = cv2.resize(mask, (recipe.width, recipe.height), interpolation=cv2.INTER_NEAREST)
        paths = folder / f"{number}{recipe.suffix}", folder / f"{number}_label.png"
        Image.fromarray(image).save(paths[0], quality=90)
        Image.fromarray(mask).save(paths[1])
        items.append(Item(*paths, str(number)))
    return items


def ours(recipe: Recipe, items: list[Item], cache: Path | None = None) -> tuple[Step, Step]:
    """Whole pipeline and transforms of this project."""
    labels = LabelTable(8)
    source = FileSource(items, labels)
    source = CachedFileSource(source, cache, 1e12) if cache else source
    augment = Augment(standard_transforms(recipe.crop, recipe.scale))
    dataset = SegmentationDataset(source, augment)
    decoded = [source.read(index) for index in range(len(items))]

    def whole(number: int) -> Any:
        return dataset[number // len(items), number % len(items)]

    def transforms(number: int) -> Any:
        return augment(*decoded[number % len(items)], 0, number)

    return whole, transforms


def mmsegmentation(recipe: Recipe, items: list[Item]) -> tuple[Step, Step] | None:
    """The same recipe as MMSegmentation's configs write it; None if it is not installed."""
    try:
        stub_mmcv_ops()
        import mmseg.datasets.transforms as segmentation
        from mmcv import transforms as mmcv
    except ImportError:
        return None
    load = mmcv.Compose([mmcv.LoadImageFromFile(), segmentation.LoadAnnotations()])
    augment = mmcv.Compose(
        [
            mmcv.RandomResize(
                recipe.scale,
                ratio_range=(0.5, 2.0),
                resize_type=segmentation.Resize,
                keep_ratio=True,
            ),
            segmentation.RandomCrop(recipe.crop, cat_max_ratio=0.75),
            mmcv.RandomFlip(prob=0.5),
            segmentation.PhotoMetricDistortion(),
            segmentation.PackSegInputs(meta_keys=()),
        ]
    )

    def read(number: int) -> Any:
        item = items[number % len(items)]
        files = {"img_path": str(item.image), "seg_map_path": str(item.mask)}
        return load(files | {"seg_fields": [], "label_map": None, "reduce_zero_label": False})

    decoded = [read(number) for number in range(len(items))]

    def transforms(number: int) -> Any:
        entry = decoded[number % len(items)]
        return augment({k: v.copy() if hasattr(v, "copy") else v for k, v in entry.items()})

    return lambda number: augment(read(number)), transforms


def stub_mmcv_ops() -> None:
    """mmcv-lite has no compiled operators; importing MMSegmentation's heads asks for them."""
    stub = ModuleType("mmcv.ops")
    stub.__spec__ = ModuleSpec("mmcv.ops", None)
    stub.__file__ = __file__
    stub.__getattr__ = lambda name: type(name, (torch.nn.Module,), {})  # type: ignore[method-assign]
    sys.modules["mmcv.ops"] = stub


def torchvision(recipe: Recipe, items: list[Item]) -> tuple[Step, Step]:
    """The nearest that torchvision's v2 transforms offer (no bound on the largest class)."""
    from torchvision import io, tv_tensors
    from torchvision.transforms import v2

    augment = v2.Compose(
        [
            v2.ScaleJitter((min(recipe.scale), max(recipe.scale)), (0.5, 2.0), antialias=False),
            v2.RandomCrop(
                recipe.crop,
                pad_if_needed=True,
                fill={tv_tensors.Image: (124, 116, 104), tv_tensors.Mask: 255},
            ),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomPhotometricDistort(p=0.5),
        ]
    )

    def read(number: int) -> Any:
        item = items[number % len(items)]
        image = io.decode_image(str(item.image), io.ImageReadMode.RGB)
        return tv_tensors.Image(image), tv_tensors.Mask(io.decode_image(str(item.mask)))

    decoded = [read(number) for number in range(len(items))]
    return (
        lambda number: augment(*read(number)),
        lambda number: augment(*decoded[number % len(items)]),
    )


def rates(steps: dict[str, Step], count: int, rounds: int) -> dict[str, float]:
    """Images per second of CPU time, best of interleaved rounds over the same indices."""
    best = dict.fromkeys(steps, 0.0)
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.process_time()
            for number in range(count):
                step(number)
            best[name] = max(best[name], count / (time.process_time() - start))
    return best


def measure(recipe: Recipe, folder: Path, count: int, rounds: int) -> list[str]:
    """One line for the transforms and one for the whole pipeline."""
    items = write_files(recipe, folder, 8)
    found = {
        "ours": ours(recipe, items),
        "cached": ours(recipe, items, folder / "cache"),
        "mmseg": mmsegmentation(recipe, items),
        "torchvision": torchvision(recipe, items),
    }
    lines = []
    for place, part in ((1, "transforms"), (0, "whole")):
        steps = {name: pair[place] for name, pair in found.items() if pair is not None}
        speed = rates(steps, count, rounds)
        cells = [f"{speed[name]:12.0f}" if name in speed else f"{'-':>12}" for name in found]
        ratios = [
            f"{speed[who] / speed[name]:18.2f}" if name in speed else f"{'-':>18}"
            for who, name in RATIOS
        ]
        lines.append(f"{recipe.name:11}{part:11}" + "".join(cells + ratios))
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=60, help="images per round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    np.random.seed(0)
    names = ("ours", "cached", "mmseg", "torchvision")
    ratios = [f"{who}/{name}" for who, name in RATIOS]
    print("images per second of CPU time, one thread; at the right, ratios")
    print(f"{'recipe':11}{'part':11}" + "".join(f"{n:>12}" for n in names), end="")
    print("".join(f"{name:>18}" for name in ratios))
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            print(
                "\n".join(measure(recipe, Path(folder), options.count, options.rounds)), flush=True
            )


if __name__ == "__main__":
    main()
