"""Started by test_ranks.py under torchrun: writes what each rank measured and got, as JSON.

Not a test: `python -m torch.distributed.run --nproc-per-node 2 run_ranks.py plain FOLDER`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import lightning.pytorch as L
import torch

sys.path.insert(0, str(Path(__file__).parent))
from conftest import Fuse, Lit, Noisy
from scale_equalization import ScaleEqualizationCallback, equalize_
from torch import distributed
from torch.utils.data import DataLoader


def digest(module: torch.nn.Module) -> str:
    tensors = module.state_dict().values()
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def all_batches(ramp: float = 0.02) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 16, 16, generator=generator) * (1 + ramp * i) for i in range(10)]


def plain(rank: int, world: int) -> tuple[torch.nn.Module, list]:
    """A plain PyTorch loop: each rank equalizes with batches of its own."""
    if world > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    network = Fuse()
    report = equalize_(network, all_batches()[rank::world], tolerance=0)
    return network, report.rows


def uneven(rank: int, world: int) -> tuple[torch.nn.Module, list]:
    """The last rank has fewer batches than the first."""
    if world > 1:
        distributed.init_process_group("gloo")
    torch.manual_seed(0)
    network = Fuse()
    every = all_batches(ramp=0.0)
    mine = every[:7] if rank == 0 else every[7:]
    report = equalize_(network, mine if world > 1 else every, tolerance=0)
    return network, report.rows


def lightning(rank: int, world: int) -> tuple[torch.nn.Module, list]:
    """Lightning's DDP: the callback deals the batches."""
    torch.manual_seed(0)
    lit, callback = Lit(Fuse()), ScaleEqualizationCallback(tolerance=0, verbose=False)
    still = Noisy(noise=0.0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=0,
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(lit, DataLoader(still, batch_size=4, shuffle=True))
    return lit.network, callback.report.rows


if __name__ == "__main__":
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    network, rows = globals()[sys.argv[1]](rank, world)
    outcome = json.dumps({"rank": rank, "digest": digest(network), "rows": rows})
    Path(sys.argv[2], f"{rank}.json").write_text(outcome)
    if distributed.is_initialized():
        distributed.destroy_process_group()
