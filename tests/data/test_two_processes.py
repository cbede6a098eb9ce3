"""Two real processes under DDP: together they see what one sees, and nothing twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import lightning.pytorch as pl
import torch
from seglab.data import ScenesDataModule

class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.train_names, self.val_names = [], []
    def training_step(self, batch, batch_idx):
        self.train_names.append(sorted(batch["name"]))
        return self.layer(torch.ones(1, 1)).sum()
    def validation_step(self, batch, batch_idx):
        self.val_names += batch["name"]
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

if __name__ == "__main__":
    folder, devices, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    data = ScenesDataModule(
        size=32, train_length=7, val_length=5, batch_size=batch_size, num_workers=0
    )
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
        max_epochs=3, num_sanity_val_steps=0, check_val_every_n_epoch=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, data)
    with open(f"{folder}/{devices}-{trainer.global_rank}.json", "w") as file:
        json.dump([model.train_names, model.val_names], file)
"""


def run(folder: Path, devices: int, batch_size: int) -> list[tuple[list[list[str]], list[str]]]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(script), str(folder), str(devices), str(batch_size)]
    subprocess.run(arguments, check=True, env=environment, timeout=240, capture_output=True)
    return [json.loads((folder / f"{devices}-{rank}.json").read_text()) for rank in range(devices)]


@pytest.mark.slow
def test_two_processes_share_steps_and_images(tmp_path: Path) -> None:
    ((one_train, one_val),) = run(tmp_path, devices=1, batch_size=4)
    (first_train, first_val), (second_train, second_val) = run(tmp_path, devices=2, batch_size=2)
    together = [sorted(a + b) for a, b in zip(first_train, second_train, strict=True)]
    assert together == one_train  # the samples of every step
    assert sorted(first_val + second_val) == sorted(one_val)
    assert len(set(one_val)) == len(one_val) == 5
