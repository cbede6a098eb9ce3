"""Images per second of whole trainings, data included: `train.py fit` and MMSegmentation's Runner.

    python benchmarks/fit.py [--crop 256] [--batch 2] [--steps 25] [--rounds 3]

UPerNet-Swin-T on generated JPEG photographs and PNG labels of 150 classes, with the recipes'
pipeline (random resize, crop, flip, photometric distortion), two loader processes, AdamW. Ours is
built by the command line from a config, equalization and logging included; theirs is mmengine's
Runner with its iteration loop. The clock runs from the end of the fifth step to that of the last.
The runs take turns. MMSegmentation is left out if it cannot be imported (`mmseg_reference.py`).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import mmseg_reference as reference
import numpy as np
import torch
import yaml
from lightning.pytorch import Callback

from seglab.cli import build_experiment

N_CLASSES, N_IMAGES, N_WARM_UP = 150, 24, 5
NAMES = [str(k) for k in range(N_CLASSES)]


def write_images(root: Path) -> None:
    """Photograph-like JPEGs of 683 x 512 and labels of large regions."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(N_IMAGES if split == "train" else 1):
            coarse = rng.integers(0, 256, (32, 43, 3), dtype=np.uint8)
            image = cv2.resize(coarse, (683, 512), interpolation=cv2.INTER_CUBIC)
            noisy = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
            regions = rng.integers(0, N_CLASSES, (8, 11), dtype=np.uint8)
            mask = cv2.resize(regions, (683, 512), interpolation=cv2.INTER_NEAREST)
            cv2.imwrite(str(root / split / "images" / f"{index}.jpg"), noisy)
            cv2.imwrite(str(root / split / "masks" / f"{index}.png"), mask)


class Clock:
    """Time at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())

    def images_per_second(self, batch: int) -> float:
        """After the warm-up."""
        n_steps = len(self.ends) - N_WARM_UP
        return n_steps * batch / (self.ends[-1] - self.ends[N_WARM_UP - 1])


class Ticking(Callback):
    """Ticks a clock at the end of each training step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        """Tick."""
        self.clock.tick()


def our_config(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a user would write."""
    crop = options.crop
    data = {
        "root": str(root), "class_names": NAMES, "crop_size": [crop, crop],
        "scale": [4 * crop, crop], "batch_size": options.batch, "num_workers": 2,
    }  # fmt: skip
    auxiliary = {"in_index": 2, "channels": 256, "num_convs": 1, "concat_input": False}
    network = {
        "encoder": component("models.TimmEncoder", name="swin_tiny_patch4_window7_224"),
        "head": component("models.heads.UPerHead"),
        "auxiliary": component("models.heads.FCNHead", **auxiliary),
    }
    return {
        "seed_everything": 0,
        "trainer": {
            "max_steps": options.steps, "max_epochs": -1, "limit_val_batches": 0,
            "log_every_n_steps": 50, "default_root_dir": str(root),
        },
        "data": component("data.FolderDataModule", **data),
        "model": {
            "network": component("models.Segmenter", **network),
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 6.0e-5}},
        },
        "scale_equalization": {"max_batches": 4},
    }  # fmt: skip


def component(path: str, **arguments: Any) -> dict[str, Any]:
    """One of seglab's classes, as configs name it."""
    return {"class_path": f"seglab.{path}", "init_args": arguments}


def ours(root: Path, options: argparse.Namespace) -> Clock:
    """`train.py fit`, with a clock."""
    path = root / "fit.yaml"
    path.write_text(yaml.safe_dump(our_config(root, options)))
    experiment = build_experiment(["--config", str(path)])
    clock = Clock()
    experiment.trainer.callbacks.append(Ticking(clock))
    experiment.trainer.fit(experiment.model, datamodule=experiment.datamodule)
    return clock


def their_network(crop: int) -> dict[str, Any]:
    """UPerNet-Swin-T as MMSegmentation's configs have it."""
    channels = (96, 192, 384, 768)
    head = reference.head_config("UPerHead", channels, N_CLASSES) | {"dropout_ratio": 0.1}
    auxiliary = reference.auxiliary_config(channels, N_CLASSES, 256) | {"dropout_ratio": 0.1}
    return reference.network_config("swin-t", head, auxiliary, crop)


def their_dataset(folder: Path, pipeline: list[dict[str, Any]]) -> dict[str, Any]:
    """The same images, as MMSegmentation's configs name them."""
    return {
        "type": "BaseSegDataset",
        "data_root": str(folder),
        "data_prefix": {"img_path": "images", "seg_map_path": "masks"},
        "metainfo": {"classes": NAMES, "palette": [[k, k, k] for k in range(N_CLASSES)]},
        "pipeline": pipeline,
    }


def their_training(crop: int) -> list[dict[str, Any]]:
    """The training pipeline of MMSegmentation's configs."""
    resize = {"scale": (4 * crop, crop), "ratio_range": (0.5, 2.0), "keep_ratio": True}
    return [
        {"type": "LoadImageFromFile"},
        {"type": "LoadAnnotations"},
        {"type": "RandomResize", **resize},
        {"type": "RandomCrop", "crop_size": (crop, crop), "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        {"type": "PackSegInputs"},
    ]


def theirs(root: Path, options: argparse.Namespace) -> Clock:
    """Mmengine's Runner, with a clock."""
    reference.builder()
    import mmseg.datasets
    import mmseg.engine  # noqa: F401
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    clock = Clock()

    class TickingHook(Hook):
        def after_train_iter(self, *_: Any, **__: Any) -> None:
            clock.tick()

    runner = Runner(
        model=their_network(options.crop),
        work_dir=str(root / "mmseg"),
        train_dataloader={
            "batch_size": options.batch, "num_workers": 2, "persistent_workers": True,
            "sampler": {"type": "InfiniteSampler", "shuffle": True},
            "dataset": their_dataset(root / "train", their_training(options.crop)),
        },
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": options.steps},
        optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 6.0e-5}},
        default_scope="mmseg",
        custom_hooks=[TickingHook()],
        log_level="WARNING",
    )  # fmt: skip
    runner.train()
    return clock


def main() -> None:
    """Print images per second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = {"MMSegmentation": theirs} if reference.is_there() else {}
    found: dict[str, list[float]] = {name: [] for name in (*ways, "ours")}
    for turn in range(options.rounds):
        both = list({**ways, "ours": ours}.items())
        for name, way in both[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                write_images(Path(folder))
                clock = way(Path(folder), options)
            found[name].append(clock.images_per_second(options.batch))
            print(f"    round {turn}: {name} {found[name][-1]:.3f} images/s", flush=True)
    print(f"torch {torch.__version__}, {vars(options)}")
    print("| whose | images/s, median of the rounds |")
    print("|---|--:|")
    for name, speeds in found.items():
        print(f"| {name} | {statistics.median(speeds):.3f} |")


if __name__ == "__main__":
    main()
