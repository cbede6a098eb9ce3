"""--help: a screen by sections, with what the given config names; nothing heavy is loaded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from seglab.cli.shipped_configs import shipped_configs
from seglab.cli.signatures import find_signature

Shown = Callable[..., str]


@pytest.fixture
def shown(run: Callable[..., None], capsys: pytest.CaptureFixture) -> Shown:
    def shown(*args: object) -> str:
        run(*args)
        return capsys.readouterr().out

    return shown


def test_help_fits_a_screen(shown: Shown) -> None:
    plain = shown("fit", "--help").splitlines()
    assert len(plain) <= 30
    for name in shipped_configs():
        lines = shown("fit", "--config", name, "--help").splitlines()
        assert len(lines) <= 55, name
        assert max(map(len, lines)) <= 79, name


def test_help_shows_keys_of_the_configs_classes(shown: Shown, tiny: Path) -> None:
    out = shown("fit", "--config", tiny, "--help")
    for place, name in (
        ("trainer", "Trainer"),
        ("data", "ScenesDataModule"),
        ("model", "SegmentationTask"),
        ("model.network", "Segmenter"),
        ("model.network.encoder", "TimmEncoder"),
        ("model.network.head", "UPerHead"),
        ("model.optimizer", "SGD"),
        ("model.scheduler", "WarmupPolyLR"),
        ("scale_equalization", "ScaleEqualizationCallback"),
    ):
        assert f"\n--{place}.KEY  {name}" in out
    for words in ("size=32", "lr=0.05", "momentum", "warmup_steps", "pool_scales", "max_epochs=2"):
        assert words in out
    for linked in ("num_classes", "params"):
        assert linked not in out
    assert out.count("in_channels") == 1  # the encoder's; heads get theirs from it


def test_values_on_the_command_line_are_shown(shown: Shown, tiny: Path) -> None:
    out = shown("fit", "--config", tiny, "--model.optimizer", "torch.optim.AdamW", "--help")
    assert "--model.optimizer.KEY  AdamW" in out
    assert "betas" in out


def test_long_help_has_every_key_with_its_meaning(shown: Shown, tiny: Path) -> None:
    out = shown("fit", "--config", tiny, "--help=all")
    for key in ("accumulate_grad_batches", "sync_batchnorm", "overfit_batches"):
        assert f"\n    {key} = " in out
    assert "\n    batch_size = 4 (config): Images per training step on one device." in out
    assert "\n    name = test_resnet (config): " in out


def test_help_of_every_command_is_short(shown: Shown) -> None:
    for command in ("validate", "test", "predict"):
        assert f" {command} --config NAME" in shown(command, "--help").splitlines()[0]


@pytest.mark.parametrize(
    "path",
    [
        "lightning.pytorch.Trainer",
        "lightning.pytorch.callbacks.EarlyStopping",
        "seglab.task.SegmentationTask",
        "seglab.data.ScenesDataModule",
        "seglab.data.FolderDataModule",
        "seglab.data.ADE20KDataModule",
        "seglab.data.VOCAugDataModule",
        "seglab.data.CityscapesDataModule",
        "seglab.models.Segmenter",
        "seglab.models.TimmEncoder",
        "seglab.models.heads.FCNHead",
        "seglab.models.heads.BiFPNHead",
        "seglab.losses.CrossEntropy",
        "seglab.inference.Inference",
        "seglab.optim.WarmupPolyLR",
        "scale_equalization.ScaleEqualizationCallback",
        "torch.optim.AdamW",
    ],
)
def test_arguments_read_from_sources_are_those_of_the_class(path: str) -> None:
    module, _, name = path.rpartition(".")
    loaded = getattr(import_module(module), name)
    read = find_signature(path)
    real = inspect.signature(loaded.__init__).parameters.values()
    named = {p.name for p in real if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
    assert named <= set(read.parameters)
    if not any(p.kind == p.VAR_KEYWORD for p in real):
        assert set(read.parameters) == named
    for parameter in real:
        if parameter.name in named:
            text = read.parameters[parameter.name].default
            assert (text is None) == (parameter.default is parameter.empty)


def test_parsers_own_arguments_are_those_read(tiny: Path) -> None:
    """What the sources say about handed-on arguments, beside what jsonargparse resolves."""
    from jsonargparse import ArgumentParser

    for path in ("seglab.data.ScenesDataModule", "seglab.data.FolderDataModule"):
        module, _, name = path.rpartition(".")
        parser = ArgumentParser(exit_on_error=False)
        added = parser.add_class_arguments(getattr(import_module(module), name))
        assert set(added) == set(find_signature(path).parameters)


def test_help_of_predict_names_what_labels_files(
    shown: Shown, run: Callable[..., None], capsys: pytest.CaptureFixture
) -> None:
    assert "see predict --input --help" in shown("predict", "--help")
    for args in (("--input", "--help"), ("--help", "--input", "a.jpg")):
        with pytest.raises(SystemExit, match="0"):
            run("predict", *args)
        words = set(capsys.readouterr().out.split())
        assert {"--output", "--overlays", "--optimize", "--backend"} <= words


def test_options_of_files_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    from seglab.cli import OF_FILES, main

    with pytest.raises(SystemExit):
        main(["predict", "--input", "a.png", "--help"])
    options = {*re.findall(r"--\w+", capsys.readouterr().out)}
    assert options == {*OF_FILES, "--ckpt_path", "--input", "--help"}
