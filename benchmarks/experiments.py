"""The 26 experiments of the paper: parameters, multiply-adds, fusions and reference mIoU.

    python benchmarks/experiments.py

Built from the configs without weights; multiply-adds of one image at the training crop, auxiliary
head left out, as MMSegmentation counts them. The mIoU columns are the configs' own comments.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from scale_equalization import find_fusions

from seglab.cli import build_experiment
from seglab.summary import summarize

CONFIGS = Path(__file__).parents[1] / "configs"
MACHINE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
PLAIN = [
    "--trainer.precision=32-true",
    "--model.network.init_args.encoder.init_args.pretrained=false",
]


def row(path: Path) -> str:
    """One line of the table."""
    experiment = build_experiment(["--config", str(path), *MACHINE, *PLAIN])
    network = experiment.model.network
    size = tuple(experiment.datamodule.crop_size)
    costs = summarize(network, size)
    small = torch.zeros(2, 3, size[0] // 4, size[1] // 4)  # fusions do not depend on the size
    found = [fusion.name for fusion in find_fusions(network.train(), small)]
    line = next(t for t in path.read_text().splitlines() if "mIoU of the paper" in t)
    without, equalized = re.findall(r"\d\d\.\d{3}", line)
    name = f"{path.parent.name}/{path.stem}"
    parameters = f"{costs.parameters['total'] / 1e6:.2f} M"
    fusions = ", ".join(name.removeprefix("decode_head.") for name in found)
    return (
        f"| {name} | {parameters} | {costs.macs / 1e9:.1f} | {fusions} | {without} | {equalized} |"
    )


def main() -> None:
    """Print the table."""
    print("| config | parameters | GMACs | fusions found | mIoU without | with |")
    print("|---|---|---|---|---|---|")
    for folder in ("ade20k", "voc_aug", "cityscapes"):
        for path in sorted((CONFIGS / folder).glob("*.yaml")):
            if "mIoU of the paper" in path.read_text():  # others: benchmarks/decoders.py
                print(row(path), flush=True)


if __name__ == "__main__":
    main()
