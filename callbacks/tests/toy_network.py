"""One toy network for many tests: what happens between its parts is given as a function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Toy(nn.Module):
    """`run(net, a, b)`: a has 4 channels and std about 0.1, b has 4 and std about 5; 8 x 8 pixels.

    `fuse1` takes 8 channels. The functions of the tests live outside, so that copies share them
    and take the weights from the copy they are given.
    """

    def __init__(self, run, fuse1=None, seed: int = 0, **modules) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.left = nn.Conv2d(3, 4, 3, padding=1)
            self.right = nn.Conv2d(3, 4, 1)
            self.fuse1 = nn.Conv2d(8, 4, 3, padding=1) if fuse1 is None else fuse1
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)
        self.double()

    def parts(self, x):
        return 0.1 * self.left(x), 5.0 * self.right(x)

    def forward(self, x):
        return self.run(self, *self.parts(x))


def cat(a, b, dim: int = 1):
    return torch.cat([a, b], dim)


def plain(net, a, b):
    return net.fuse1(cat(a, b))


def data(n: int = 3, size: int = 8, seed: int = 1) -> list[torch.Tensor]:
    """Batches whose scale differs from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 3, size, size)
    return [
        (1.0 + 0.2 * i) * torch.randn(shape, generator=generator, dtype=torch.float64) + 0.1
        for i in range(n)
    ]


def conv(inputs: int = 8, outputs: int = 4, size: int = 3, seed: int = 5, **options) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def linear(inputs: int = 8, outputs: int = 4, seed: int = 6, **options) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(inputs, outputs, **options)


def pooled(x):
    return F.adaptive_avg_pool2d(x, 1).flatten(1)
