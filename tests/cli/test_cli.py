"""python train.py fit, validate, test, predict: what a user types and what is there afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from seglab.task import SegmentationTask

Run = Callable[..., None]
Logged = Callable[[Path, str], list[float]]
Fit = Callable[..., Path]


def test_fit_leaves_checkpoints_logs_and_pictures(fitted: Path) -> None:
    names = {str(path.relative_to(fitted)) for path in fitted.rglob("*") if path.is_file()}
    assert names >= {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "metrics.csv",
        "results.json",
        "results.md",
        "scale_equalization.csv",
        "scale_equalization.json",
        "pictures/step_0000002.png",
        "pictures/step_0000004.png",
    }
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert np.asarray(Image.open(fitted / "pictures/step_0000004.png")).shape[2] == 3


def test_fit_logs_losses_metrics_and_learning_rate(logged: Logged, fitted: Path) -> None:
    assert len(logged(fitted, "train/loss")) == 4
    assert len(logged(fitted, "val/mIoU")) == 2
    assert all(0 <= value <= 1 for value in logged(fitted, "val/IoU/ground"))
    rates = logged(fitted, "lr")
    np.testing.assert_allclose(rates, [0.05 * (1 - t / 3) for t in range(4)], atol=1e-9)


def test_fit_ends_with_table_and_paths(fit: Fit, capsys: pytest.CaptureFixture) -> None:
    folder = fit()
    out = capsys.readouterr().out
    assert "val after 4 steps, in percent" in out
    for line in ("ground ", "coarse ", "mean ", "best val/mIoU "):
        assert f"\n{line}" in out
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "pictures", "results.md"):
        assert str(folder / name) in out


def test_results_hold_what_the_console_shows(fitted: Path, logged: Logged) -> None:
    results = json.loads((fitted / "results.json").read_text())
    assert (results["command"], results["step"], results["split"]) == ("fit", 4, "val")
    for key in ("mIoU", "mAcc", "aAcc", "mDice", "loss"):
        assert results[key] == pytest.approx(logged(fitted, f"val/{key}")[-1], abs=1e-6)
    assert len(results["classes"]) == 8
    for row in results["classes"]:
        if row["share_of_labels"]:
            found = logged(fitted, f"val/IoU/{row['name']}")[-1]
            assert row["IoU"] == pytest.approx(found, abs=1e-6)
    assert results["best_val/mIoU"] == pytest.approx(max(logged(fitted, "val/mIoU")), abs=1e-6)
    assert Path(results["best_checkpoint"]).is_file()
    table = (fitted / "results.md").read_text()
    assert f"| ground | {100 * results['classes'][0]['IoU']:.2f} |" in table
    assert f"| all | | {100 * results['aAcc']:.2f} | | |" in table


def test_best_checkpoint_is_that_of_the_best_validation(logged: Logged, fitted: Path) -> None:
    best = torch.load(fitted / "checkpoints/best.ckpt", weights_only=True)
    scores = logged(fitted, "val/mIoU")
    assert best["global_step"] == 2 * (1 + int(np.argmax(scores)))


def test_checkpoint_loads_without_config(fitted: Path) -> None:
    task = SegmentationTask.load_from_checkpoint(fitted / "checkpoints/last.ckpt")
    saved = torch.load(fitted / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in task.state_dict().items())
    assert task.class_names[:2] == ("ground", "lake")
    assert task.eval()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 8, 32, 32)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluation_needs_only_the_checkpoint(
    run: Run,
    logged: Logged,
    fitted: Path,
    tmp_path: Path,
    command: str,
    capsys: pytest.CaptureFixture,
) -> None:
    checkpoint = fitted / "checkpoints/last.ckpt"
    run(command, "--ckpt_path", checkpoint, "--trainer.default_root_dir", tmp_path)
    (folder,) = tmp_path.rglob(f"{command}_0")
    stage = "val" if command == "validate" else "test"
    (score,) = logged(folder, f"{stage}/mIoU")
    assert f"{stage}, in percent" in capsys.readouterr().out
    if command == "validate":
        assert score == pytest.approx(logged(fitted, "val/mIoU")[-1], abs=1e-6)


def test_config_wins_over_the_checkpoint(
    run: Run, fitted: Path, tiny: Path, tmp_path: Path
) -> None:
    args = ["--config", tiny, "--ckpt_path", fitted / "checkpoints/last.ckpt"]
    options = ["--model.auxiliary_weight", "0.7", "--trainer.default_root_dir", tmp_path]
    run("validate", *args, *options)
    saved = yaml.safe_load((tmp_path / "tiny/validate_0/config.yaml").read_text())
    assert saved["model"]["auxiliary_weight"] == 0.7


def test_single_values_override_the_checkpoints_config(
    run: Run, fitted: Path, tmp_path: Path
) -> None:
    checkpoint = fitted / "checkpoints/last.ckpt"
    options = ["--model.inference.flip", "true", "--data.val_length", "3"]
    run("validate", "--ckpt_path", checkpoint, *options, "--trainer.default_root_dir", tmp_path)
    (path,) = tmp_path.rglob("config.yaml")
    saved = yaml.safe_load(path.read_text())
    assert saved["model"]["inference"]["flip"] is True
    assert saved["data"]["init_args"]["val_length"] == 3
    assert saved["data"]["init_args"]["size"] == 32


def test_saved_config_runs_again_and_gives_the_same(
    run: Run, logged: Logged, fitted: Path, tmp_path: Path
) -> None:
    run("fit", "--config", fitted / "config.yaml", "--trainer.default_root_dir", tmp_path)
    (again,) = tmp_path.rglob("version_0")
    assert logged(again, "train/loss") == logged(fitted, "train/loss")


def test_resume_equals_an_uninterrupted_run(logged: Logged, fit: Fit, tmp_path: Path) -> None:
    # The schedule is that of the whole training, so only the end differs from the full run.
    # Dropout would draw other numbers: Lightning restores no random states.
    args = ["--model.scheduler.total_steps", "4", "--model.network.head.dropout", "0"]
    whole = fit(*args)
    half = fit("--trainer.max_epochs", "1", *args)
    resumed = fit("--ckpt_path", half / "checkpoints/last.ckpt", *args)
    assert (half.name, resumed.name) == ("version_1", "version_2")
    assert logged(half, "train/loss") + logged(resumed, "train/loss") == pytest.approx(
        logged(whole, "train/loss"), abs=1e-6
    )
    expected = torch.load(whole / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    joined = torch.load(resumed / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for key, value in expected.items():
        torch.testing.assert_close(joined[key], value)


def test_speed_is_a_section_of_the_config(fit: Fit) -> None:
    folder = fit("--speed.channels_last", "true", "--trainer.max_epochs", "1")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["speed"] == {"channels_last": True, "compile": False, "accelerate": False}
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    weight = state["network.decode_head.fpn_bottleneck.conv.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_predict_writes_indexed_masks_and_overlays(run: Run, fitted: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name, size in (("wide", (50, 34)), ("tall", (33, 60))):
        images.mkdir(exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{name}.jpg")
    data = {
        "class_path": "seglab.data.FolderDataModule",
        "init_args": {
            "root": str(tmp_path),
            "class_names": list("abcdefgh"),
            "predict_folder": str(images),
            "num_workers": 0,
        },
    }
    out = tmp_path / "out"
    run(
        "predict",
        *("--ckpt_path", fitted / "checkpoints/best.ckpt"),
        *("--data", json.dumps(data), "--predictions.folder", out),
        *("--trainer.default_root_dir", tmp_path),
    )
    for name, size in (("wide", (50, 34)), ("tall", (33, 60))):
        with Image.open(out / "masks" / f"{name}.png") as mask:
            assert mask.mode == "P"
            assert mask.size == size
            assert np.asarray(mask).max() < 8
        with Image.open(out / "overlays" / f"{name}.png") as mixed:
            assert (mixed.mode, mixed.size) == ("RGB", size)


class Recorder:
    """Initial weights (before any equalization) and the first batches, as training sees them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.initial: dict[str, Tensor] = {}
        self.batches: list[int] = []
        setup, step = SegmentationTask.setup, SegmentationTask.training_step

        def spy_on_setup(task: SegmentationTask, stage: str) -> None:
            setup(task, stage)
            self.initial = {key: value.clone() for key, value in task.state_dict().items()}

        def spy_on_step(task: SegmentationTask, batch: dict, index: int) -> Tensor:
            self.batches.append(hash((batch["image"].numpy().tobytes(), tuple(batch["name"]))))
            return step(task, batch, index)

        monkeypatch.setattr(SegmentationTask, "setup", spy_on_setup)
        monkeypatch.setattr(SegmentationTask, "training_step", spy_on_step)


@pytest.fixture
def recorder() -> Iterator[Callable[[], Recorder]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield lambda: Recorder(monkeypatch)


def test_control_run_has_the_same_start_and_data(
    logged: Logged, fit: Fit, recorder: Callable[[], Recorder]
) -> None:
    equalized = recorder()
    folded = fit()
    control = recorder()
    plain = fit("--scale_equalization.mode", "off")
    assert len(control.batches) == 4
    assert control.batches == equalized.batches[:4]
    assert control.initial.keys() == equalized.initial.keys()
    assert all(torch.equal(control.initial[key], equalized.initial[key]) for key in control.initial)
    assert logged(plain, "train/loss") != logged(folded, "train/loss")


def test_control_run_equals_one_without_the_callback(
    logged: Logged, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = fit("--scale_equalization.mode", "off")
    from scale_equalization import ScaleEqualizationCallback

    monkeypatch.setattr(ScaleEqualizationCallback, "on_fit_start", lambda *_: None)
    bare = fit()
    assert logged(measured, "train/loss") == logged(bare, "train/loss")
    assert logged(measured, "val/mIoU") == logged(bare, "val/mIoU")


def test_optimizer_change_keeps_nothing_of_the_old_ones_arguments(
    run: Run, tiny: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="0"):
        run("fit", "--config", tiny, "--model.optimizer", "torch.optim.RMSprop", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["optimizer"]["class_path"] == "torch.optim.RMSprop"
    assert printed["model"]["network"]["init_args"]["encoder"]["init_args"]["name"] == "test_resnet"
    assert printed["seed_everything"] == 0


def test_own_callbacks_replace_defaults_of_their_kind(fit: Fit) -> None:
    folder = fit(
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.filename=mine",
        "--trainer.callbacks.monitor=val/loss",
    )
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"mine.ckpt"}


def test_dry_run_leaves_nothing_behind(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("fit", "--config", tiny, "--trainer.fast_dev_run", "true")
    assert list(tmp_path.iterdir()) == []


def test_sections_can_be_left_out(fit: Fit) -> None:
    folder = fit("--without", "[scale_equalization]")
    assert not (folder / "scale_equalization.json").exists()


def test_experiment_is_built_without_being_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seglab.cli import build_experiment

    monkeypatch.chdir(tmp_path)
    experiment = build_experiment(["--config", str(tiny), "--data.size", "64"])
    assert experiment.model.num_classes == experiment.datamodule.num_classes == 8
    assert experiment.datamodule.size == 64
    assert experiment.trainer.max_epochs == 2
    assert list(tmp_path.iterdir()) == []
