"""What a user gets for a mistake: one sentence, an exit code, and no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from seglab.cli.user_errors import one_sentence

ROOT = Path(__file__).parents[2]
Run = Callable[..., None]


@pytest.fixture
def complaint(run: Run, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run a command line that must fail; returns exit code and stderr."""

    def complaint(*args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit, match=r"\d") as caught:
            run(*args)
        lines = [line for line in capsys.readouterr().err.splitlines() if "seglab:" in line]
        assert len(lines) == 1
        assert "Traceback" not in lines[0]
        return int(caught.value.code), lines[0]

    return complaint


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model.netwrk", "3"], "--model.netwrk"),
        (["--trainer.max_epochs", "two"], "trainer.max_epochs: Expected a int; got two"),
        (["--data.sizee", "3"], "'sizee' is not accepted; did you mean 'size'?"),
        (["--data", "SceneDataModule"], "no class SceneDataModule is known"),
        (["--model.optimizer", "torch.optim.SGDD"], "has no attribute 'SGDD'"),
        (["--model.network.encoder.nam", "x"], "'nam' is not accepted; did you mean 'name'?"),
        (["--scale_equalization.mode", "of"], "one of 'fold', 'reparametrize', 'off'"),
        (["--trainer.max_steps", "1e4"], "trainer.max_steps"),
    ],
)
def test_wrong_argument_is_named(
    complaint: Callable, tiny: Path, args: list[str], said: str
) -> None:
    code, sentence = complaint("fit", "--config", tiny, *args)
    assert code == 2
    assert said in sentence
    assert len(sentence) < 300


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modl": {"weights": None}}, "modl"),
        ({"trainer": {"max_epoch": 3}}, "max_epoch"),
        ({"model": {"losss": None}}, "losss"),
    ],
)
def test_wrong_key_in_a_config_is_named(
    complaint: Callable, tiny: Path, tmp_path: Path, change: dict, said: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(change))
    code, sentence = complaint("fit", "--config", tiny, "--config", path)
    assert code == 2
    assert said in sentence


def test_config_that_is_no_yaml_is_named(complaint: Callable, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    for content, said in (("model: [1, 2", "is no YAML"), ("fit", "must hold sections")):
        path.write_text(content)
        sentence = complaint("fit", "--config", path)[1]
        assert "broken.yaml" in sentence
        assert said in sentence


def test_missing_files_are_named(complaint: Callable, tiny: Path) -> None:
    assert "none.yaml" in complaint("fit", "--config", "none.yaml")[1]
    code, sentence = complaint("fit", "--config", tiny, "--ckpt_path", "none.ckpt")
    assert (code, "ckpt_path: none.ckpt does not exist" in sentence) == (1, True)
    assert "none.ckpt does not exist" in complaint("validate", "--ckpt_path", "none.ckpt")[1]


def folder_data(path: Path, **options: object) -> Path:
    """A config with a `data` section only."""
    data = {"class_path": "seglab.data.FolderDataModule", "init_args": options}
    path.write_text(yaml.safe_dump({"data": data}))
    return path


def test_missing_data_folder_is_named(complaint: Callable, tiny: Path, tmp_path: Path) -> None:
    options = {"root": f"{tmp_path}/none", "class_names": ["a", "b"]}
    config = folder_data(tmp_path / "folder.yaml", **options)
    args = ["--config", tiny, "--config", config, "--trainer.default_root_dir", tmp_path]
    code, sentence = complaint("fit", *args)
    assert code == 1
    assert f"{tmp_path}/none" in sentence


def test_checkpoint_of_other_classes_is_explained(
    complaint: Callable, fitted: Path, tiny: Path, tmp_path: Path
) -> None:
    options = {"root": str(tmp_path), "class_names": ["a", "b"], "predict_folder": str(tmp_path)}
    config = folder_data(tmp_path / "two.yaml", **options)
    (tmp_path / "image.png").write_bytes((fitted / "pictures/step_0000002.png").read_bytes())
    args = ["--config", config, "--trainer.default_root_dir", tmp_path]
    code, sentence = complaint("predict", *args, "--ckpt_path", fitted / "checkpoints/last.ckpt")
    assert code == 1
    assert "was made for 8 classes, but the data has 2" in sentence


def test_checkpoint_without_config_says_what_to_give(complaint: Callable, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    _, sentence = complaint("validate", "--ckpt_path", tmp_path / "bare.ckpt")
    assert "holds no config: give the model and data section with --config" in sentence


def test_unknown_command_suggests_the_nearest(complaint: Callable) -> None:
    assert complaint("fot") == (2, "seglab: no command 'fot'; did you mean 'fit'?")


def test_traceback_is_there_for_those_who_ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        run("validate", "--ckpt_path", "none.ckpt", "--traceback")
    monkeypatch.setenv("SEGLAB_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        run("validate", "--ckpt_path", "none.ckpt")


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ValueError, match="not from here"), one_sentence():
        raise ValueError("not from here")
    with pytest.raises(AttributeError, match="nothing"), one_sentence():
        _ = None.nothing  # type: ignore[attr-defined]


def test_help_and_version_load_no_torch() -> None:
    code = (
        "import sys; from seglab.cli import main; main([sys.argv[1]]); print('torch' in"
        " sys.modules)"
    )
    for option, said in (("--help", "predict"), ("--version", "seglab 0")):
        done = subprocess.run(
            [sys.executable, "-c", code, option], capture_output=True, text=True, cwd=ROOT
        )
        assert said in done.stdout
        assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trainer.logger", "WandbLogger"], "the package wandb is not installed"),
        (["--data.batch_size", "0"], "data.batch_size is 0; it must be at least 1"),
        (["--trainer.devices", "two"], "should be an int > 0"),
        (["--model.optimizer.lr", "-1"], "Invalid learning rate: -1.0"),
        (["--model.network.encoder.name", "resnet5o"], "nearest: resnet50"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(
    complaint: Callable, tiny: Path, tmp_path: Path, args: list[str], said: str
) -> None:
    root = ("--trainer.default_root_dir", tmp_path / "logs")
    code, sentence = complaint("fit", "--config", tiny, *root, *args)
    assert code == 1
    assert said in sentence
    assert "Namespace" not in sentence
    assert len(sentence) < 200
    assert not (tmp_path / "logs").exists()
