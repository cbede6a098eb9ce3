"""Fine-tuning from 11 to 12 classes beside training anew, at equal steps: one table.

    nice python benchmarks/fine_tuning.py --root /path/to/camvid [--steps 50] [--seeds 0 1]

The twelfth class is made from the labels: the kerb, road less than `KERB` pixels from anything
else. A small UPerNet is trained on the 11 classes of `configs/camvid`, at a third of the images'
size, then networks of 12 classes from the same seed, with `--model.weights` and without. All else
is the same: steps, schedule, order of the images. mIoU is that of the 101 validation images.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from seglab.cli import main

CONFIG = Path(__file__).parents[1] / "configs/camvid/upernet_resnet18.yaml"
SHRINK, KERB = 3, 3  # the kerb in pixels of the small masks
ROAD, UNLABELLED, NEW = 3, 11, 12  # ids in the files; the new one leads to class 11


def write_small(root: Path, folder: Path) -> None:
    """Scale the data down, once with the 11 classes and once with the kerb as a twelfth."""
    import cv2

    for path in sorted(root.glob("*/images/*.jpg")):
        split = path.parts[-3]
        for kind in ("images", "masks", "masks12"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            size = (image.width // SHRINK, image.height // SHRINK)
            small = image.resize(size, Image.Resampling.BOX)
        small.save(folder / split / "images" / f"{path.stem}.png")
        with Image.open(root / split / "masks" / f"{path.stem}.png") as file:
            mask = np.array(file.resize(size, Image.Resampling.NEAREST))
        road = ((mask == ROAD) | (mask == UNLABELLED)).astype(np.uint8)
        near = cv2.distanceTransform(road, cv2.DIST_L2, 5) <= KERB
        Image.fromarray(mask).save(folder / split / "masks" / f"{path.stem}.png")
        kerb = np.where((mask == ROAD) & near, NEW, mask).astype(np.uint8)
        Image.fromarray(kerb).save(folder / split / "masks12" / f"{path.stem}.png")


def write_configs(folder: Path) -> None:
    """The shipped config on the small images, for 11 and for 12 classes."""
    config = yaml.safe_load(CONFIG.read_text())
    data = config["data"]["init_args"]
    for key in ("scale", "eval_scale", "palette"):
        del data[key]
    data |= {"root": str(folder), "crop_size": [96, 128], "num_workers": 0}
    data |= {"batch_size": 4, "eval_batch_size": 8}
    (folder / "11.yaml").write_text(yaml.safe_dump(config))
    data |= {"class_names": [*data["class_names"], "kerb"], "masks": "{split}/masks12/{stem}"}
    data["value_map"] = {UNLABELLED: 255, NEW: 11}
    (folder / "12.yaml").write_text(yaml.safe_dump(config))


def train(folder: Path, n_classes: int, steps: int, seed: int, *more: str) -> Path:
    """Train without a word; the run's folder."""
    root = folder / f"runs{len([*folder.glob('runs*')])}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main([
            *("fit", "--config", str(folder / f"{n_classes}.yaml"), "--seed_everything", str(seed)),
            *("--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps)),
            *("--trainer.check_val_every_n_epoch", "null", "--trainer.accelerator", "cpu"),
            *("--trainer.val_check_interval", str(steps), "--trainer.log_every_n_steps", "10"),
            *("--model.scheduler.warmup_steps", str(steps // 10)),
            *("--scale_equalization.max_batches", "8", "--scale_equalization.verbose", "false"),
            *("--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"),
            *more,
        ])  # fmt: skip
    return root / f"{n_classes}/version_0"


def scores(run: Path) -> tuple[float, float]:
    """MIoU and the IoU of the last class, in percent."""
    results = json.loads((run / "results.json").read_text())
    return 100 * results["mIoU"], 100 * (results["classes"][-1]["IoU"] or 0.0)


def run_all(options: argparse.Namespace, folder: Path) -> None:
    """Train everything and print a row for each seed."""
    write_small(options.root, folder)
    write_configs(folder)
    print("| seed | 11 classes | 12 anew | 12 fine-tuned | kerb anew | kerb fine-tuned |")
    print("|--:|--:|--:|--:|--:|--:|", flush=True)
    for seed in options.seeds:
        first = train(folder, 11, options.first_steps, seed)
        weights = first / "checkpoints/last.ckpt"
        anew = scores(train(folder, 12, options.steps, seed))
        tuned = scores(train(folder, 12, options.steps, seed, "--model.weights", str(weights)))
        cells = [scores(first)[0], anew[0], tuned[0], anew[1], tuned[1]]
        print(f"| {seed} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--first-steps", type=int, default=150, help="on the 11 classes")
    parser.add_argument("--steps", type=int, default=50, help="on the 12 classes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run_all(arguments, Path(place))
