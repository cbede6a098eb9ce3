"""Make a trained network run faster without changing what it computes.

network, done = optimize(network, image)
print(done)

Batch normalizations are folded into the layers before them (`operators/folding.py`), fusions of
other people's networks are computed without upsampled maps (`operators/lazy_mode.py`), and on the
CPU convolutions get packed weights (`operators/packing.py`). Of what remains possible, channels
first or last, with or without each of these, a short trial on an image of the real size takes the
fastest. The result must equal the plain network on random and real images; what does not is undone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seglab.operators.accelerated import Settings, install
from seglab.operators.comparison import Results, overall_error
from seglab.operators.folding import Folding, fold_batch_norms_, outputs_of
from seglab.operators.fusion_conv import FusionConv2d
from seglab.operators.packing import pack_convolutions_

TOLERANCE = 1e-4
"""Largest difference allowed in float32, relative to the largest logit."""

MIN_GAIN = 1.02
SMALL = 128  # pixels to a side, where only results matter and not the time


class CannotOptimizeError(ValueError):
    """The network would compute something else; the message says what."""


@dataclass(frozen=True)
class Optimizations:
    """What was done to a network.

    Attributes:
        folding: Batch normalizations.
        fused: Names of convolutions that read branches at their own resolution, where the network
            does not do so by itself.
        layout: "channels_first" or "channels_last".
        n_packed: How many convolutions have packed weights.
        n_activations: How many ReLUs went into them.
        gain: Time of the plain network over that of this one, on the image given.
        error: Largest difference of a logit in the network's own precision, relative to the
            largest.
    """

    folding: Folding
    fused: tuple[str, ...]
    layout: str
    n_packed: int
    n_activations: int
    gain: float
    error: float

    def __str__(self) -> str:
        parts = [str(self.folding)]
        if self.fused:
            parts.append(f"{len(self.fused)} fusions without upsampled maps")
        if self.n_packed:
            relus = f" ({self.n_activations} with their ReLU)" if self.n_activations else ""
            parts.append(f"{self.n_packed} convolutions packed{relus}")
        parts.append(self.layout.replace("_", " "))
        return (
            f"{self.gain:.2f} times as fast, differs by {self.error:.1e} of the largest logit: "
            + ", ".join(parts)
        )


@dataclass(frozen=True)
class _Candidate:
    network: nn.Module
    layout: str
    fused: tuple[str, ...] = ()
    n_packed: int = 0
    n_activations: int = 0


def optimize(
    network: nn.Module, image: Tensor, repeats: int = 3
) -> tuple[nn.Module, Optimizations]:
    """Make a copy of a network that computes the same, faster.

    Args:
        network: Images (B, C, H, W) to logits, on the device where it will run. Left as it is.
        image: A real one, of the size that matters.
        repeats: Timed passes of each candidate, in turn.

    Returns:
        The copy, in evaluation mode and without gradients, and what was done to it. It cannot be
        trained.

    Raises:
        CannotOptimizeError: Every way would change what the network computes.

    >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> faster, done = optimize(network, torch.rand(1, 3, 32, 32))
    >>> done.folding.n_norms
    1
    """
    with torch.inference_mode(False), torch.no_grad():
        plain = copy.deepcopy(network).eval().requires_grad_(False)
        folded = copy.deepcopy(plain)
        folding = fold_batch_norms_(folded, _small(plain, image))
        candidates = list(_candidates(folded, image))
        trials = [trial for trial in _trials(image) if _runs(plain, trial)]
        with _full_precision(image.device):
            expected = [outputs_of(plain, trial) for trial in trials]
            errors = [_error(each.network, trials, expected) for each in candidates]
        proved = [each for each, e in zip(candidates, errors, strict=True) if e <= TOLERANCE]
        if not proved:
            raise CannotOptimizeError(
                f"the network would compute something else: its logits would differ by"
                f" {min(errors):.1e} of the largest, allowed is {TOLERANCE:.0e}. Use it without"
                " optimize"
            )
        seconds = _seconds([plain, *(each.network for each in proved)], image, repeats)
    best = min(range(len(proved)), key=lambda index: seconds[index + 1])
    if seconds[1] < seconds[best + 1] * MIN_GAIN:
        best = 0  # the simplest, where nothing gains
    chosen = proved[best]
    error = errors[candidates.index(chosen)]
    gain = seconds[0] / seconds[best + 1]
    counts = chosen.n_packed, chosen.n_activations
    return chosen.network, Optimizations(folding, chosen.fused, chosen.layout, *counts, gain, error)


def _candidates(folded: nn.Module, image: Tensor) -> Iterator[_Candidate]:
    """The folded network, and what else may be faster; the simplest first."""
    yield _Candidate(folded, "channels_first")
    for fused in (False, True):
        network, names = copy.deepcopy(folded), tuple[str, ...]()
        if fused:
            names = _fuse(network, image)
            if not names:
                return
            yield _Candidate(network, "channels_first", names)
            network = copy.deepcopy(network)
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)
        yield _Candidate(last, "channels_last", names)
        if image.device.type == "cpu":
            packed = copy.deepcopy(last)
            counts = pack_convolutions_(packed, _small(packed, image), names)
            if counts[0]:
                yield _Candidate(packed, "channels_last", names, *counts)


def _small(network: nn.Module, image: Tensor) -> Tensor:
    """A part of the image where the network takes it: for what does not depend on its size."""
    part = image[:1, ..., :SMALL, :SMALL]
    return part if _runs(network, part) else image[:1]


def _fuse(network: nn.Module, image: Tensor) -> tuple[str, ...]:
    """Compute fusions without upsampled maps wherever that is predicted to gain, in place."""
    settings = Settings(force=None, layers={})
    undo = install(network, settings)
    try:
        network(image)
    except Exception:  # a network whose maps cannot be lazy stays as it is
        settings.layers = None
    names, settings.layers = tuple(settings.layers or ()), None
    modules = dict(network.named_modules())
    if all(isinstance(modules.get(name), FusionConv2d) for name in names):
        undo()  # these do so by themselves
        return ()
    return names


def _trials(image: Tensor) -> list[Tensor]:
    """The image, and noise of the same kind in another size."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, image.shape[1], min(SMALL, image.shape[2]), min(SMALL, image.shape[3]))
    noise = torch.randint(0, 256, shape, generator=generator).to(image.device)
    if image.is_floating_point():
        noise = noise * (float(image.abs().max()) / 255)
    return [image, noise.to(image.dtype)]


def _full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Without TensorFloat-32, whose rounding alone exceeds the tolerance."""
    if device.type != "cuda":
        return nullcontext()
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def _error(network: nn.Module, trials: Sequence[Tensor], expected: Sequence[Results]) -> float:
    try:
        found = [outputs_of(network, trial) for trial in trials]
    except Exception:  # whatever a network does in other surroundings
        return float("inf")
    return max(overall_error(*pair) for pair in zip(found, expected, strict=True))


def _runs(network: nn.Module, image: Tensor) -> bool:
    try:
        network(image)
    except Exception:  # a size that the network does not take
        return False
    return True


def _seconds(networks: Sequence[nn.Module], image: Tensor, repeats: int) -> list[float]:
    """Least time of each network, in turn; one pass before is not timed."""
    times: list[list[float]] = [[] for _ in networks]
    for turn in range(repeats + 1):
        for index, network in enumerate(networks):
            start = time.perf_counter()
            with torch.inference_mode():
                network(image)
            if image.device.type == "cuda":
                torch.cuda.synchronize(image.device)
            if turn:
                times[index].append(time.perf_counter() - start)
    return [min(each) for each in times]
