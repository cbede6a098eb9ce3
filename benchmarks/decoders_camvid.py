"""Decoders on CamVid at equal steps, with scale equalization and without: one table, resumable.

    nice python benchmarks/decoders_camvid.py --root /path/to/camvid --results camvid.jsonl \
        --steps 1350 --seeds 0 1 2 [--crop 160 224] [--budget 25] [--networks upernet eseg ...]

Trains the networks of `configs/camvid` from the same seeds, each with the recipe of its config but
for the length, the crop and what is said on the command line; mIoU is that of the last step on the
101 validation images. A finished run is a line of the results file and is not run again; after
`--budget` minutes no run is begun. Runs go seed by seed, so that what is finished can be compared.
The table gives mean and sample standard deviation over the seeds, and of the differences that
equalizing makes seed by seed. GMACs and images per second of CPU time on one thread are those of
one image of 360 x 480. Without `--root` the table of the results file is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seglab.cli import build_experiment
from seglab.summary import summarize

CONFIGS = Path(__file__).parents[1] / "configs" / "camvid"
NETWORKS = ("upernet", "pspnet", "eseg", "rsp")
SIZE = (360, 480)
Run = dict[str, Any]

EQUALIZED = ["--scale_equalization.mode", "fold", "--scale_equalization.verbose", "false"]


def key_of(run: Run) -> str:
    """What tells one run from another; its outcome is no part of it."""
    return json.dumps({k: v for k, v in run.items() if k not in ("mIoU", "seconds")})


def planned(options: argparse.Namespace) -> Iterator[Run]:
    """All runs asked for, seed by seed."""
    for seed in options.seeds:
        for network in options.networks:
            for equalized in (False, True):
                yield {
                    "network": network, "equalized": equalized, "seed": seed,
                    "steps": options.steps, "crop": list(options.crop), "batch": options.batch,
                }  # fmt: skip


def train(run: Run, root: str, folder: str) -> float:
    """Train and validate: mIoU in percent after the last step.

    With EfficientDet's momentum of 0.01 running statistics need some hundred steps to settle: in
    runs below a thousand steps the momentum is raised to 10 / steps.
    """
    experiment = build_experiment([
        *("--config", str(CONFIGS / f"{run['network']}_resnet18.yaml"), "--data.root", root),
        *("--data.crop_size", str(run["crop"]), "--data.batch_size", str(run["batch"])),
        *("--data.num_workers", "0", "--seed_everything", str(run["seed"])),
        *("--model.scheduler.init_args.warmup_steps", str(max(1, run["steps"] // 13))),
        *("--trainer.max_epochs", "-1", "--trainer.max_steps", str(run["steps"])),
        *("--trainer.limit_val_batches", "0", "--trainer.logger", "false"),
        *("--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false"),
        *("--trainer.default_root_dir", folder),
        *([] if run["equalized"] else ["--without", "[scale_equalization]"]),
        *(EQUALIZED if run["equalized"] else []),
    ])  # fmt: skip
    for module in experiment.model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.momentum:
            module.momentum = max(module.momentum, 10 / run["steps"])
    experiment.trainer.fit(experiment.model, experiment.datamodule)
    experiment.trainer.limit_val_batches = 1.0
    (result,) = experiment.trainer.validate(experiment.model, experiment.datamodule, verbose=False)
    return 100 * result["val/mIoU"]


def go_on(options: argparse.Namespace) -> None:
    """Do what is not in the results file yet."""
    begun = time.monotonic()
    done = {key_of(run) for run in read(options.results)}
    for run in planned(options):
        if key_of(run) in done:
            continue
        if time.monotonic() - begun > 60 * options.budget:
            print(f"the budget of {options.budget:g} minutes is spent; start again to go on\n")
            return
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            run["mIoU"] = train(run, options.root, folder)
        run["seconds"] = round(time.monotonic() - start, 1)
        with options.results.open("a") as file:
            file.write(json.dumps(run) + "\n")


def read(results: Path) -> list[Run]:
    """Finished runs."""
    return (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )


def cost(network: str) -> tuple[float, float, float]:
    """Parameters in millions, GMACs and images per second of CPU time."""
    experiment = build_experiment([
        *("--config", str(CONFIGS / f"{network}_resnet18.yaml"), "--trainer.logger", "false"),
        *("--without", "[scale_equalization]"),
    ])  # fmt: skip
    model: nn.Module = experiment.model.network.eval()
    found = summarize(model, SIZE)
    image, seconds = torch.rand(1, 3, *SIZE) * 255, []
    with torch.inference_mode():
        for _ in range(4):
            start = time.process_time()
            model(image)
            seconds.append(time.process_time() - start)
    own = sum(p.numel() for p in (*model.encoder.parameters(), *model.decode_head.parameters()))
    return own / 1e6, found.macs / 1e9, 1 / statistics.median(seconds[1:])


def with_spread(values: list[float], sign: str = "") -> str:
    """Mean ± sample standard deviation; without one for a single value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def print_table(runs: list[Run]) -> None:
    """One line for each network and kind of run."""
    heads = ["network", "parameters, M", "GMACs", "images/s", "steps, batch, crop", "seeds"]
    heads += ["mIoU, plain", "equalized", "difference"]
    print(f"| {' | '.join(heads)} |\n|---|--:|--:|--:|---|--:|--:|--:|--:|")
    groups: dict[tuple[str, str], dict[int, dict[bool, float]]] = {}
    for run in runs:
        kind = f"{run['steps']}, {run['batch']}, {run['crop'][0]} x {run['crop'][1]}"
        seeds = groups.setdefault((run["network"], kind), {})
        seeds.setdefault(run["seed"], {})[run["equalized"]] = run["mIoU"]
    for (network, kind), seeds in groups.items():
        pairs = [pair for pair in seeds.values() if len(pair) == 2]
        if pairs:
            costs = (f"{v:.{n}f}" for v, n in zip(cost(network), (2, 2, 1), strict=True))
            plain, equalized = ([pair[e] for pair in pairs] for e in (False, True))
            gains = [pair[True] - pair[False] for pair in pairs]
            cells = [with_spread(plain), with_spread(equalized), with_spread(gains, "+")]
            print(f"| {' | '.join([network, *costs, kind, str(len(pairs)), *cells])} |")


def main() -> None:
    """Train what is missing, print what there is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", help="CamVid, as root/{train,val}/{images,masks}")
    parser.add_argument("--results", type=Path, default=Path("camvid.jsonl"))
    parser.add_argument("--steps", type=int, default=1350)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs=2, default=(160, 224))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.root:
        go_on(options)
    print_table(read(options.results))


if __name__ == "__main__":
    main()
