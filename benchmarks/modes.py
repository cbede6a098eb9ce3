"""The same numbers in every mode: worst deviation from the plain float64 way, network by mode.

    python benchmarks/modes.py [--device cuda] [--networks UPerHead]

A cell holds the relative deviation of the loss, the worst one of the gradients by parameter name,
and the share of pixels that are labelled otherwise. Gradients: of all elements of a parameter
together (Euclidean norm), relative to the exact gradient, or to a thousandth of the largest one
where that is less: some are zero but for rounding. Half precision stands beside the plain way in
the same precision, whose error is the measure of ours.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import seglab
from seglab.losses import CrossEntropy
from seglab.models import FusionConv2d, Segmenter, SmpNetwork, TimmEncoder
from seglab.models.heads import (
    ASPPHead,
    BiFPNHead,
    FCNHead,
    PSPHead,
    RSPHead,
    SepASPPHead,
    UPerHead,
)
from seglab.models.recompute import recompute_blocks_
from seglab.operators.acceleration import CannotAccelerateError
from seglab.operators.logit_resize import LogitResize
from seglab.operators.resampling import Resampling
from seglab.operators.upsampled import upsampled_argmax

K = 5


class Step(nn.Module):
    """Loss of a batch in training, labels in evaluation; fused, or the plain way.

    Args:
        network: whose fusion layers are set.
        plain: resize, concatenate, convolve, and make full-size logits.
    """

    def __init__(self, network: nn.Module, plain: bool = False) -> None:
        super().__init__()
        self.network = network
        self.plain = plain
        for module in network.modules():
            if isinstance(module, FusionConv2d) and (plain or module.groups == 1):
                module.force = "plain" if plain else "fused"

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Map uint8 images (B, 3, H, W) and labels (B, H, W) to a scalar, or to (B, H, W)."""
        logits = self.network.decode(image)
        size = (target.shape[1], target.shape[2])
        if self.training:
            return torch.stack([self._loss(x, target) for x in logits]).sum()
        if self.plain:
            return self._full(logits[0], size).argmax(dim=1)
        how = LogitResize(self.network.upsampling or Resampling())
        return upsampled_argmax(logits[0], size, how).long()

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.plain:
            return CrossEntropy()(self._full(logits, target.shape[1:]), target)
        return CrossEntropy().on_upsampled(logits, target)

    @staticmethod
    def _full(logits: Tensor, size: Any) -> Tensor:
        if logits.dtype != torch.float64:
            logits = logits.float()
        return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Result:
    """What one training pass and one evaluation gave."""

    loss: Tensor
    gradients: Mapping[str, Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Deviation:
    """How far a result is from the exact one; gradients are None where the mode has none."""

    loss: float
    gradients: float | None
    labels: float
    worst: str = ""

    def __str__(self) -> str:
        gradients = "-" if self.gradients is None else f"{self.gradients:.0e}"
        return f"{self.loss:.0e} / {gradients} / {self.labels:.2%}"


def deviation(found: Result, exact: Result) -> Deviation:
    """Compare by parameter name; a gradient that is missing on either side is infinitely far."""
    norms = {name: float(x.norm()) for name, x in exact.gradients.items()}
    floor = 1e-3 * max(norms.values())
    errors = {
        name: float((found.gradients[name].double() - x).norm()) / max(norms[name], floor)
        if name in found.gradients
        else float("inf")
        for name, x in exact.gradients.items()
    }
    errors |= {name: float("inf") for name in found.gradients.keys() - exact.gradients.keys()}
    worst = max(errors, key=lambda name: errors[name])
    loss = abs(float(found.loss) / float(exact.loss) - 1)
    labels = float((found.labels != exact.labels).double().mean())
    return Deviation(loss, errors[worst] if found.gradients else None, labels, worst)


@dataclass(frozen=True)
class Mode:
    """How a step is run.

    Attributes:
        dtype: of weights.
        plain: the plain way.
        autocast: dtype of autocast around both passes.
        prepare: changes or wraps a step; parameters' names are those within.
        loss_scale: keeps small gradients above the least number of 16 bits.
    """

    dtype: torch.dtype = torch.float64
    plain: bool = False
    autocast: torch.dtype | None = None
    prepare: Callable[[Step, Tensor, Tensor], nn.Module] = lambda step, image, target: step
    loss_scale: float = 1.0

    def run(self, network: nn.Module, image: Tensor, target: Tensor) -> Result:
        """Train and evaluate a copy of the network once."""
        torch.manual_seed(0)
        step = Step(copy.deepcopy(network).to(self.dtype), self.plain)
        module = self.prepare(step, image, target)
        owner = getattr(module, "module", module)
        on = torch.autocast(image.device.type, self.autocast, enabled=self.autocast is not None)
        with on:
            loss = module.train()(image, target)
        (loss * self.loss_scale).backward()
        gradients = {
            name: p.grad.detach() / self.loss_scale
            for name, p in owner.named_parameters()
            if p.grad is not None
        }
        with on, torch.no_grad():
            labels = module.eval()(image, target)
        return Result(loss.detach(), gradients, labels)


class InferenceMode(Mode):
    """No gradients: loss and labels in inference mode."""

    def run(self, network: nn.Module, image: Tensor, target: Tensor) -> Result:
        """As in `Mode`, without gradients."""
        step = Step(copy.deepcopy(network).to(self.dtype))
        with torch.inference_mode():
            loss = step.train()(image, target)
            return Result(loss, {}, step.eval()(image, target))


class Export(Mode):
    """Labels of the exported network; the loss is that of the network it was made from."""

    def run(self, network: nn.Module, image: Tensor, target: Tensor) -> Result:
        """As in `Mode`, without gradients."""
        step = Step(copy.deepcopy(network).to(self.dtype)).train()
        loss = step(image, target).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations within torch
            exported = torch.export.export(step.network.eval(), (image,)).module()
        return Result(loss, {}, exported(image).argmax(dim=1))


def channels_last(step: Step, image: Tensor, target: Tensor) -> nn.Module:
    """Weights, and so maps, in channels-last layout."""
    return step.to(memory_format=torch.channels_last)


def recompute(keep: bool, step: Step, image: Tensor, target: Tensor) -> nn.Module:
    """Blocks of the encoder computed again."""
    recompute_blocks_(step.network, keep)
    return step


def accelerated(step: Step, image: Tensor, target: Tensor) -> nn.Module:
    """By the public function, whatever it gains."""
    seglab.accelerate(step.network, image, force="fused", min_gain=0, repeats=1)
    return step


def averaged(step: Step, image: Tensor, target: Tensor) -> nn.Module:
    """A copy kept as exponential moving average."""
    return AveragedModel(step, multi_avg_fn=lambda *_: None, use_buffers=True)


def hooked(step: Step, image: Tensor, target: Tensor) -> nn.Module:
    """Somebody looks at every output, without gradient, and at every gradient."""

    def look(module: nn.Module, args: Any, output: Any) -> None:
        with torch.no_grad():
            for x in output if isinstance(output, list | tuple) else [output]:
                x.double().mean()

    for module in step.modules():
        module.register_forward_hook(look)
        if isinstance(module, nn.Conv2d):  # torch refuses them before activations in place
            module.register_full_backward_hook(lambda module, inputs, outputs: None)
    return step


def distributed(
    options: Mapping[str, bool], step: Step, image: Tensor, target: Tensor
) -> nn.Module:
    """Wrapped for data-parallel training, in a group of one process."""
    return DistributedDataParallel(step, **options)


@contextmanager
def process_group() -> Iterator[None]:
    """A group of one."""
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(os.path.join(folder, "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def compiled(step: Step, image: Tensor, target: Tensor) -> nn.Module:
    """One graph, by the compiler's front end; what it generates is the compiler's own matter."""
    torch.compiler.reset()
    step.network.decode = torch.compile(step.network.decode, backend="aot_eager", fullgraph=True)
    return step


MODES: dict[str, Mode] = {
    "64-true": Mode(),
    "32-true, plain": Mode(torch.float32, plain=True),
    "32-true": Mode(torch.float32),
    "bf16-mixed, plain": Mode(torch.float32, plain=True, autocast=torch.bfloat16),
    "bf16-mixed": Mode(torch.float32, autocast=torch.bfloat16),
    "16-mixed, plain": Mode(torch.float32, plain=True, autocast=torch.float16, loss_scale=4096),
    "16-mixed": Mode(torch.float32, autocast=torch.float16, loss_scale=4096),
    "bf16-true, plain": Mode(torch.bfloat16, plain=True),
    "bf16-true": Mode(torch.bfloat16),
    "channels-last": Mode(prepare=channels_last),
    "compile": Mode(prepare=compiled),
    "recompute": Mode(prepare=partial(recompute, False)),
    "recompute, pointwise": Mode(prepare=partial(recompute, True)),
    "accelerate": Mode(prepare=accelerated),
    "EMA": Mode(prepare=averaged),
    "DDP": Mode(prepare=partial(distributed, {})),
    "DDP, unused": Mode(prepare=partial(distributed, {"find_unused_parameters": True})),
    "DDP, static": Mode(prepare=partial(distributed, {"static_graph": True})),
    "hooks": Mode(prepare=hooked),
    "inference mode": InferenceMode(),
    "export": Export(),
}
HALF = ("bf16-mixed", "16-mixed", "bf16-true")


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Every head on a small encoder, and a network of another library."""
    kinds = (UPerHead, PSPHead, ASPPHead, SepASPPHead, FCNHead, BiFPNHead, RSPHead)
    auxiliary = partial(FCNHead, channels=8, dropout=0.0, in_index=2, num_convs=1)

    def ours(kind: Any) -> nn.Module:
        head = partial(kind, channels=8, dropout=0.0)
        return Segmenter(TimmEncoder("test_resnet"), head, auxiliary, K)

    found: dict[str, Callable[[], nn.Module]] = {k.__name__: partial(ours, k) for k in kinds}
    return found | {"smp Unet": lambda: SmpNetwork("Unet", "resnet18", K)}


def batch(device: str, size: int = 64, n_images: int = 4) -> tuple[Tensor, Tensor]:
    """Random images, and labels of which a part is ignored."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (n_images, 3, size, size), generator=generator).to(torch.uint8)
    target = torch.randint(0, K, (n_images, size, size), generator=generator)
    target[:, : size // 5] = 255
    return image.to(device), target.to(device)


@dataclass
class Column:
    """One network in every mode."""

    make: Callable[[], nn.Module]
    device: str
    cells: dict[str, Deviation | str] = field(default_factory=dict)

    def fill(self, modes: Mapping[str, Mode]) -> None:
        """Run each mode; what is refused says so."""
        torch.manual_seed(0)
        network, data = self.make().to(self.device), batch(self.device)
        exact = Mode(plain=True).run(network, *data)
        for name, mode in modes.items():
            found = _run_or_refusal(mode, network, *data)
            self.cells[name] = found if isinstance(found, str) else deviation(found, exact)


def _run_or_refusal(mode: Mode, network: nn.Module, image: Tensor, target: Tensor) -> Result | str:
    try:
        return mode.run(network, image, target)
    except (CannotAccelerateError, ValueError) as refusal:
        return f"refused: {str(refusal).splitlines()[0]}"


def matrix(names: Sequence[str], device: str = "cpu") -> dict[str, dict[str, Deviation | str]]:
    """Cells by network, then mode."""
    columns = {name: Column(networks()[name], device) for name in names}
    with process_group():
        for column in columns.values():
            column.fill(MODES)
    return {name: column.cells for name, column in columns.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", nargs="+", default=list(networks()), choices=list(networks()))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    cells = matrix(options.networks, options.device)
    print(f"torch {torch.__version__}; deviation of loss / worst gradient / labels")
    print("| mode |", " | ".join(cells), "|\n|---|", "---|" * len(cells), sep="")
    for mode in MODES:
        row = [str(column[mode]).partition(":")[0] for column in cells.values()]
        print(f"| {mode} | {' | '.join(row)} |", flush=True)
    reasons = {str(c) for column in cells.values() for c in column.values() if isinstance(c, str)}
    print("\n".join(sorted(reasons)))


if __name__ == "__main__":
    main()
