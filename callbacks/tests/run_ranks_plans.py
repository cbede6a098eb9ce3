"""Started by test_ranks.py: ranks that do not see alike batches.

Not a test: `python -m torch.distributed.run --nproc-per-node 2 run_ranks_plans.py FOLDER`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from scale_equalization import ScaleEqualizationError, equalize_
from torch import Tensor, distributed, nn


class Ways(nn.Module):
    """Small images take one way more than large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Conv2d(6, 3, 3, padding=1)
        self.small = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.always(torch.cat([x, 4 * x.flip(3)], 1)).relu()
        if x.shape[3] < 10:
            mixed = self.small(torch.cat([x, mixed], 1))
        return mixed


def images(n: int, width: int = 8, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 8, width, generator=generator) for _ in range(n)]


def ways(rank: int) -> list[Tensor]:
    return images(4, width=8 if rank == 0 else 16)


def empty(rank: int) -> list[Tensor]:
    return images(4) if rank == 0 else []


def all_empty(rank: int) -> list[Tensor]:
    return []


def broken(rank: int) -> list[Tensor]:
    good = images(4)
    return good if rank == 0 else [*good[:2], good[2] * float("nan")]


def raising(rank: int) -> list[Tensor]:
    return images(4) if rank == 0 else [*images(2), torch.zeros(4, 5, 8, 8)]


def uneven(rank: int) -> list[Tensor]:
    return images(7)[:7] if rank == 0 else images(3, seed=2)


def outcome(batches: list[Tensor]) -> dict:
    torch.manual_seed(0)
    network = Ways()
    try:
        report = equalize_(network, batches, tolerance=0)
        said = {"report": report.to_dict(), "error": ""}
    except ScaleEqualizationError as error:
        said = {"report": None, "error": str(error)}
    except RuntimeError as error:
        said = {"report": None, "error": f"own: {error}"}
    return {**said, "state": network.state_dict()}


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo")
    cases = (ways, empty, all_empty, broken, raising, uneven)
    results = {case.__name__: outcome(case(rank)) for case in cases}
    torch.save(results, Path(sys.argv[1], f"{rank}.pt"))
    distributed.destroy_process_group()
