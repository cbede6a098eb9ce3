"""One small training on 1 x 8, 1 x 1 x 8, 1 x 2 x 4 and two processes x 2 x 2: all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
SCRIPT = """
import json, sys
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from step_runs import Diary, NoiseData, make_task, make_trainer

if __name__ == "__main__":
    folder, devices, batch_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    diary = Diary()
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = make_trainer(
        folder, diary, saver, devices=devices, strategy="ddp" if devices > 1 else "auto",
        max_steps=5, max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None,
        gradient_clip_val=0.05, enable_checkpointing=True,
    )
    trainer.fit(make_task(total_batch=8), NoiseData(batch_size=batch_size))
    found = [diary.images, diary.validations, diary.inside]
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
"""


def run(folder: Path, devices: int, batch_size: int) -> tuple[list[list[str]], list[list[int]]]:
    """Images of every step over all ranks; validations of every rank."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, script, folder, devices, batch_size]
    done = subprocess.run(
        list(map(str, arguments)), env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]
    assert all(inside == [] for _, _, inside in ranks)
    steps = zip(*(images for images, _, _ in ranks), strict=True)
    images = [sorted(name for names in step for name in names) for step in steps]
    return images, [validations for _, validations, _ in ranks]


@pytest.mark.slow
def test_layouts_of_one_total_batch_are_one_training(tmp_path: Path) -> None:
    layouts = {"1x8": (1, 8), "1x1x8": (1, 1), "1x2x4": (1, 2), "2x2x2": (2, 2)}
    found = {name: run(tmp_path / name, *layout) for name, layout in layouts.items()}
    expected, validations = found["1x8"]
    assert [len(images) for images in expected] == [8] * 5
    names = sorted(path.name for path in (tmp_path / "1x8").glob("*.ckpt"))
    assert names == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    for name, (images, of_ranks) in found.items():
        assert images == expected, name
        assert all(steps == [2, 4, 5] for steps in (*validations, *of_ranks)), name
        for checkpoint in names:
            ours, theirs = (
                torch.load(tmp_path / layout / checkpoint, weights_only=True)
                for layout in (name, "1x8")
            )
            assert ours["global_step"] == theirs["global_step"]
            torch.testing.assert_close(
                ours["state_dict"], theirs["state_dict"], rtol=1e-4, atol=1e-6
            )
