"""The three official layouts through the user's door: prepare, doctor, fit, validate, predict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

Run = Callable[..., None]

SETS = {
    "ADE20KDataModule": ("ade20k_root", "ADEChallengeData2016/images/validation", 150, 3),
    "VOCAugDataModule": ("voc_root", "VOCdevkit/VOC2012/JPEGImages", 21, 6),
    "CityscapesDataModule": ("cityscapes_root", "leftImg8bit/val/munster", 19, 2),
}


@pytest.fixture(params=SETS)
def layout(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> tuple[Path, Path, int]:
    """A config for one miniature layout, a folder of its images and their number."""
    root_fixture, images, _, n_images = SETS[request.param]
    root = request.getfixturevalue(root_fixture)
    config = yaml.safe_load(tiny.read_text())
    config["data"] = {
        "class_path": f"seglab.data.{request.param}",
        "init_args": {
            "root": str(root),
            "batch_size": 2,
            "num_workers": 0,
            "crop_size": [32, 32],
            "scale": [64, 32],
        },
    }
    config["trainer"] |= {"max_steps": 2, "max_epochs": 1, "default_root_dir": str(tmp_path)}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, root / images, n_images


@pytest.mark.slow
def test_official_layout_passes_every_command(
    run: Run, layout: tuple[Path, Path, int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, images, n_images = layout
    run("prepare", "--config", config)
    with pytest.raises(SystemExit) as verdict:
        run("doctor", "--config", config)
    assert verdict.value.code == 0, capsys.readouterr().out
    run("fit", "--config", config)
    (checkpoint,) = tmp_path.glob("experiment/*/checkpoints/last.ckpt")
    capsys.readouterr()
    run("validate", "--ckpt_path", checkpoint, "--trainer.default_root_dir", tmp_path)
    assert "mean " in capsys.readouterr().out
    target = tmp_path / "predicted"
    options = ["--data.predict_folder", images, "--predictions.folder", target]
    run("predict", "--ckpt_path", checkpoint, *options, "--trainer.default_root_dir", tmp_path)
    written = sorted((target / "masks").glob("*.png"))
    assert len(written) == n_images == len(list((target / "overlays").glob("*.png")))
    for path in written:
        (image,) = images.glob(f"{path.stem}.*")
        with Image.open(path) as mask, Image.open(image) as source:
            assert mask.mode == "P"
            assert mask.size == source.size
            assert np.asarray(mask).max() < SETS[_module(config)][2]
    if _module(config) in SERVERS:
        server, values = SERVERS[_module(config)]
        options = ["--submission", server, "--input", images, "--output", tmp_path / "server"]
        run("predict", "--ckpt_path", checkpoint, *options, "--device", "cpu")
        for path in written:
            sent = Image.open(tmp_path / "server" / path.name)
            assert sent.mode == "L"
            assert (np.asarray(sent) == np.array(values)[np.asarray(Image.open(path))]).all()


# Values that the servers take: cityscapesScripts/helpers/labels.py; ADE20K's annotations.
SERVERS = {
    "ADE20KDataModule": ("ade20k", [*range(1, 151)]),
    "CityscapesDataModule": (
        "cityscapes",
        [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33],
    ),
}


def _module(config: Path) -> str:
    name: str = yaml.safe_load(config.read_text())["data"]["class_path"]
    return name.rpartition(".")[2]
