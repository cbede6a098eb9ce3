"""Images per second of whole evaluations: `train.py validate` and MMSegmentation's ValLoop.

    python benchmarks/evaluation.py [--images 8] [--rounds 2] [--threads 1]

UPerNet-Swin-T, random weights, on generated JPEG photographs of 683 x 512 and PNG labels of 150
classes: reading, resizing to fit 2048 x 512, the network on one image at a time, logits at the
image's size, counting, and the table at the end. Ours is built by the command line from a config,
with all that an evaluation leaves (scores and counts of every image, intervals, best and worst
pictures); theirs is mmengine's Runner with IoUMetric. All in the process itself, so that its
processor time is that of everything, which hardly depends on what else the machine does. The clock
runs from the end of the second image to the end of the evaluation. The runs take turns.
MMSegmentation is left out if it cannot be imported (`mmseg_reference.py`).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mmseg_reference as reference
import torch
import yaml
from fit import our_config, their_dataset, their_network, write_images
from lightning.pytorch import Callback

from seglab.cli import build_experiment

N_WARM_UP = 2


class Clock:
    """Seconds of the processor between the end of the warm-up and that of the evaluation."""

    def __init__(self) -> None:
        self.n_images = 0
        self.start = 0.0

    def tick(self) -> None:
        """An image has been counted."""
        self.n_images += 1
        if self.n_images == N_WARM_UP:
            self.start = time.process_time()

    def images_per_second(self) -> float:
        """At the end of the evaluation."""
        return (self.n_images - N_WARM_UP) / (time.process_time() - self.start)


class Ticking(Callback):
    """Ticks a clock at the end of each image."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_validation_batch_end(self, *_: Any) -> None:
        """Tick."""
        self.clock.tick()


def ours(root: Path) -> float:
    """`train.py validate` of a network as it comes."""
    config = our_config(root, argparse.Namespace(crop=512, batch=1, steps=1))
    del config["scale_equalization"]
    config["trainer"] = {"default_root_dir": str(root), "accelerator": "cpu"}
    config["data"]["init_args"] |= {
        "eval_scale": [2048, 512], "eval_batch_size": 1, "num_workers": 0,
    }  # fmt: skip
    path = root / "validate.yaml"
    path.write_text(yaml.safe_dump(config))
    experiment = build_experiment(["--config", str(path)])
    clock = Clock()
    experiment.trainer.callbacks.append(Ticking(clock))
    experiment.trainer.validate(experiment.model, datamodule=experiment.datamodule)
    return clock.images_per_second()


def theirs(root: Path) -> float:
    """Mmengine's Runner."""
    reference.builder()
    import mmseg.datasets
    import mmseg.engine
    import mmseg.evaluation  # noqa: F401
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    clock = Clock()

    class TickingHook(Hook):
        def after_val_iter(self, *_: Any, **__: Any) -> None:
            clock.tick()

    network = their_network(512)
    network["data_preprocessor"].pop("size")
    network["data_preprocessor"]["test_cfg"] = {"size_divisor": 1}
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (2048, 512), "keep_ratio": True},
        {"type": "LoadAnnotations"},
        {"type": "PackSegInputs"},
    ]
    runner = Runner(
        model=network,
        work_dir=str(root / "mmseg"),
        val_dataloader={
            "batch_size": 1, "num_workers": 0, "persistent_workers": False,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": their_dataset(root / "val", pipeline),
        },
        val_cfg={"type": "ValLoop"},
        val_evaluator={"type": "IoUMetric", "iou_metrics": ["mIoU"]},
        default_scope="mmseg",
        custom_hooks=[TickingHook()],
        log_level="WARNING",
    )  # fmt: skip
    runner.val()
    return clock.images_per_second()


def main() -> None:
    """Print images per second."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways = {"MMSegmentation": theirs} if reference.is_there() else {}
    ways["ours"] = ours
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds):
        for name, way in list(ways.items())[:: -1 if turn % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                write_images(root)
                for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
                    for index in range(options.images):
                        source = root / "train" / kind / f"{index}{suffix}"
                        shutil.copy(source, root / "val" / kind)
                found[name].append(way(root))
            print(f"    round {turn}: {name} {found[name][-1]:.3f} images/s", flush=True)
    print(f"torch {torch.__version__}, {vars(options)}")
    print("| whose | images/s of processor time | times as fast as the first |\n|---|--:|--:|")
    first = next(iter(found.values()))
    for name, speeds in found.items():
        ratios = [b / a for a, b in zip(first, speeds, strict=True)]
        print(f"| {name} | {statistics.median(speeds):.3f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
