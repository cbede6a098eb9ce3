"""Commands around a run, as a user types them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from seglab.cli.commands import read_data

Run = Callable[..., None]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config whose other sections could not be built here."""
    path = tmp_path / "config.yaml"
    data = {
        "class_path": "seglab.data.FolderDataModule",
        "init_args": {"root": str(tmp_path / "set"), "class_names": ["a", "b"]},
    }
    path.write_text(yaml.safe_dump({"data": data, "model": {"network": "nowhere"}}))
    rng = np.random.default_rng(0)
    for split, n in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (tmp_path / "set" / split / kind).mkdir(parents=True)
        for i in range(n):
            folder = tmp_path / "set" / split
            image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / "images" / f"{i}.png")
            mask = np.full((40, 50), i % 2, dtype=np.uint8)
            Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return path


def test_doctor_counts_and_leaves_with_zero(run: Run, config: Path, capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        run("doctor", "--config", config)
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert "no faults" in out
    assert "50x40 (3)" in out


def test_doctor_names_the_fault_and_leaves_with_one(run: Run, config: Path, capsys) -> None:
    bad = config.parent / "set/val/masks/1.png"
    Image.fromarray(np.full((40, 50), 7, dtype=np.uint8)).save(bad)
    with pytest.raises(SystemExit) as leaving:
        run("doctor", "--config", config)
    assert leaving.value.code == 1
    assert "1.png" in capsys.readouterr().out


def test_browse_writes_a_picture(
    run: Run, config: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "sheet.png"
    run("browse", "--config", config, "--output", target, "--n_samples", 2, "--data.seed", 3)
    assert np.asarray(Image.open(target)).std() > 10
    assert str(target) in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    run("browse", "--config", config, "--n_samples", 1)
    assert f"open {tmp_path / 'samples.png'}" in capsys.readouterr().out


def test_half_said_and_nameless_pictures_are_refused(run: Run, config: Path, capsys) -> None:
    for typed, said in (
        (("init", config.parent, "--images", "x/*"), "--images and --masks go together"),
        (("browse", "--config", config, "--output", config.parent), "is no name of a picture"),
    ):
        with pytest.raises(SystemExit):
            run(*typed)
        assert said in capsys.readouterr().err


def test_data_arguments_override_the_config(config: Path) -> None:
    data = read_data(["--config", str(config), "--data.batch_size", "7", "--trainer.devices=3"])
    assert data.batch_size == 7
    assert data.class_names == ("a", "b")


def test_prepare_of_own_images_has_nothing_to_do(run: Run, config: Path, capsys) -> None:
    run("prepare", "--config", config)
    assert "prepared" in capsys.readouterr().out


def test_wrong_data_argument_is_one_sentence(run: Run, config: Path, capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        run("doctor", "--config", config, "--data.rooot", "x")
    assert leaving.value.code == 2
    err = capsys.readouterr().err
    assert "rooot" in err
    assert len(err.splitlines()) == 1


def test_equalized_file_starts_a_control_run(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.chdir(tmp_path)
    run("equalize", "--config", tiny, "--output", "init.ckpt")
    assert {path.name for path in tmp_path.iterdir()} <= {"init.ckpt", tiny.name}
    saved = torch.load("init.ckpt", weights_only=True)
    assert saved["scale_equalized"] is True
    options = ["--model.weights", "init.ckpt", "--trainer.max_steps", 0]
    plain = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    run("fit", "--config", tiny, *options, *plain, "--scale_equalization.mode", "off")
    run("fit", "--config", tiny, *options, *plain, "--scale_equalization.verbose", "true")
    assert "left alone: the weights come from a file that says they are equalized" in caplog.text


@pytest.mark.parametrize("command", ["doctor", "browse", "prepare", "equalize"])
def test_help_of_a_command_names_its_options(run: Run, command: str, capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        run(command, "--help")
    assert leaving.value.code == 0
    assert f"seglab {command} --config FILE" in capsys.readouterr().out


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from seglab.cli import main; main(['--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'cv2', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
