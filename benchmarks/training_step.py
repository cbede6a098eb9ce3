"""Whole training steps of the recipes' networks: ours, ours the plain way, MMSegmentation's own.

    python benchmarks/training_step.py [--crop 512] [--batch 2] [--threads 2]
    python benchmarks/training_step.py --profile --networks UPerNet-Swin-T
    python benchmarks/training_step.py --device cuda --precision bf16-mixed --batch 4

Ours is `SegmentationTask.training_step` with its optimizer. The plain way is the same network that
resizes, concatenates, convolves and makes full-size logits, and steps its optimizer tensor by
tensor. MMSegmentation's (`mmseg_reference.py` says how to get it; left out if it is not there) is
`EncoderDecoder.train_step`, which its loop calls, data preprocessor and all, with the same weights
and without dropout, so that all must find the same loss: the first one is printed. With
`--hugging-face`, UPerNet of transformers as well; its weights are its own.

All in one process, in turn, medians of the wall clock; nothing else may run. Memory is the most
that is held at once: weights, optimizer state, and the allocations of a step as the profiler saw
them. `--profile` lists the operators of one step of each.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mmseg_reference as reference
import torch
from acceleration import upernet
from plain_way import bare_task
from side_by_side import HEADER, peak_bytes, rows, time_in_turn
from torch import Tensor, nn

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import ASPPHead, FCNHead, Head, PSPHead, SepASPPHead, UPerHead

N_CLASSES = 150
Optimizers = Callable[..., torch.optim.Optimizer]
ADAMW = partial(torch.optim.AdamW, lr=6e-5, weight_decay=0.01)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Recipe:
    """A network of the recipes, ours and theirs."""

    backbone: str
    head: type[Head]
    optimizer: Optimizers


RECIPES = {
    "UPerNet-Swin-T": Recipe("swin-t", UPerHead, ADAMW),
    "UPerNet-ConvNeXt-T": Recipe("convnext-t", UPerHead, ADAMW),
    "PSPNet-R101-D8": Recipe("resnet-101", PSPHead, SGD),
    "DeepLabV3-R101-D8": Recipe("resnet-101", ASPPHead, SGD),
    "DeepLabV3+-R101-D8": Recipe("resnet-101", SepASPPHead, SGD),
    "FCN-R101-D8": Recipe("resnet-101", FCNHead, SGD),
}


@dataclass(frozen=True)
class Trainer:
    """One optimizer step, and what it works on."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Tensor, Tensor], float]


def ours(
    recipe: Recipe, state: dict[str, Tensor] | None, plain: bool, pointwise: bool = False
) -> Trainer:
    """Our task, or the same the plain way; with MMSegmentation's weights, if given."""
    encoder = TimmEncoder(
        reference.BACKBONES[recipe.backbone][1],
        output_stride=8 if recipe.backbone == "resnet-101" else 32,
        gradient_checkpointing="pointwise" if pointwise else False,
    )
    auxiliary = FCNHead(
        encoder.channels, N_CLASSES, channels=256, dropout=0.0, in_index=2, num_convs=1,
        concat_input=False,
    )  # fmt: skip
    network = Segmenter(encoder, recipe.head(encoder.channels, N_CLASSES, dropout=0.0), auxiliary)
    if state is not None:
        network.load_state_dict(network.translate_state(state))
    factory = partial(recipe.optimizer, fused=False) if plain else recipe.optimizer
    task = bare_task(network, "plain" if plain else None, factory)
    optimizer = task.configure_optimizers()

    def step(image: Tensor, target: Tensor) -> float:
        found = task.training_step({"image": image, "mask": target}, 0)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        return found.item()

    return Trainer(network, optimizer, step)


def theirs(recipe: Recipe, crop: int) -> Trainer:
    """MMSegmentation's network, optimizer wrapper and `train_step`."""
    from mmengine.optim import OptimWrapper

    channels = TimmEncoder(reference.BACKBONES[recipe.backbone][1]).channels
    network = reference.builder()(
        reference.network_config(
            recipe.backbone,
            reference.head_config(recipe.head.__name__, channels, N_CLASSES),
            reference.auxiliary_config(channels, N_CLASSES, channels=256),
            crop,
        )
    ).train()
    reference.scramble(network)
    wrapper = OptimWrapper(recipe.optimizer(network.parameters()))

    packed = functools.cache(reference.samples)  # once: a loader's work, not a step's

    def step(image: Tensor, target: Tensor) -> float:
        found = network.train_step(packed(image, target), wrapper)
        return sum(float(found[name]) for name in ("decode.loss_ce", "aux.loss_ce"))

    return Trainer(network, wrapper.optimizer, step)


def hugging_face(recipe: Recipe) -> Trainer:
    """The network of this name in transformers, which computes its loss itself."""
    network = upernet(recipe.backbone, N_CLASSES).train()
    optimizer = recipe.optimizer(network.parameters())
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (reference.MEAN, reference.STD))

    def step(image: Tensor, target: Tensor) -> float:
        pixels = (image.float() - mean.to(image.device)) / std.to(image.device)
        found = network(pixel_values=pixels, labels=target).loss
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        return float(found)

    return Trainer(network, optimizer, step)


def standing_bytes(trainer: Trainer) -> int:
    """Weights, buffers and optimizer state; gradients come and go with a step."""
    state = [x for s in trainer.optimizer.state.values() for x in s.values()]
    tensors = [*trainer.network.parameters(), *trainer.network.buffers(), *state]
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


def compare(name: str, options: argparse.Namespace) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    recipe = RECIPES[name]
    trainers: dict[str, Trainer] = {}
    if reference.is_there():
        trainers["MMSegmentation"] = theirs(recipe, options.crop)
    state = trainers["MMSegmentation"].network.state_dict() if trainers else None
    if options.hugging_face and recipe.head is UPerHead:
        trainers["transformers"] = hugging_face(recipe)
    plain = trainers["plain"] = ours(recipe, state, plain=True)
    trainers["ours"] = ours(recipe, None, plain=False, pointwise=options.pointwise)
    trainers["ours"].network.load_state_dict(plain.network.state_dict())
    for trainer in trainers.values():
        trainer.network.to(options.device)
    size = (options.batch, options.crop, options.crop)
    image = torch.randint(0, 256, (size[0], 3, *size[1:]), dtype=torch.uint8).to(options.device)
    target = torch.randint(0, N_CLASSES, size).to(options.device)
    half = options.precision == "bf16-mixed"

    def run(trainer: Trainer) -> float:
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=half):
            return trainer.step(image, target)

    first = {way: run(trainer) for way, trainer in trainers.items()}
    print(f"    {name}: loss of the first step {first}")
    same = [loss for way, loss in first.items() if way != "transformers"]
    if not math.isclose(min(same), max(same), rel_tol=1e-2 if half else 1e-4):
        raise SystemExit(f"{name}: the networks do not compute the same")
    steps = {way: partial(run, trainer) for way, trainer in trainers.items()}
    times = time_in_turn(steps, options.repeats)
    peaks = {}
    for way, trainer in trainers.items():
        if options.profile:
            print(f"    {name}, {way}")
        trainer.optimizer.zero_grad()
        moving = peak_bytes(steps[way], 14 if options.profile else 0, options.device)
        trainer.optimizer.zero_grad()
        peaks[way] = moving + standing_bytes(trainer)
    return rows(name, times, peaks)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--pointwise", action="store_true", help="recompute in our encoder")
    parser.add_argument("--hugging-face", action="store_true", help="UPerNet of transformers too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {vars(options)}")
    print(HEADER.format("network", "ms", "peak MB"))
    for name in options.networks:
        print(compare(name, options), flush=True)


if __name__ == "__main__":
    main()
