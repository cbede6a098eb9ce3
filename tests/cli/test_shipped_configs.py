"""Configs by name: files win, shipped ones are found from anywhere, typing errors are told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seglab.cli.shipped_configs import config_folder, find_config, shipped_configs, with_paths

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_shipped_config_has_a_name() -> None:
    files = {path.resolve() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {find_config(name).resolve() for name in shipped_configs()} == files
    assert len(files) > 30


@pytest.mark.parametrize(
    "name",
    ["ade20k/rsp_r101", "configs/ade20k/rsp_r101.yaml", "ade20k/rsp_r101.yaml"],
)
def test_shipped_config_is_found_from_anywhere(name: str) -> None:
    assert find_config(name) == config_folder() / "ade20k/rsp_r101.yaml"


def test_file_on_disk_wins(elsewhere: Path) -> None:
    (elsewhere / "configs").mkdir()
    for name in ("quickstart", "configs/quickstart.yaml"):
        (elsewhere / name).write_text("")
        assert find_config(name) == Path(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("ade20k/upernet_swin", "ade20k/upernet_swin_t"),
        ("quikstart", "quickstart"),
        ("configs/quikstart.yaml", "quickstart"),
        ("mine/my_set.yml", "mine/my_sets.yaml"),
    ],
)
def test_unknown_name_suggests_the_nearest(elsewhere: Path, name: str, near: str) -> None:
    (elsewhere / "mine").mkdir()
    (elsewhere / "mine/my_sets.yaml").write_text("")
    with pytest.raises(FileNotFoundError, match=rf"did you mean {near}\w*\?$"):
        find_config(name)


def test_both_spellings_of_the_option_are_resolved() -> None:
    path = str(config_folder() / "quickstart.yaml")
    args = ["--config", "quickstart", "--data.x", "quickstart", "-c=quickstart", "--config"]
    expected = ["--config", path, "--data.x", "quickstart", f"-c={path}", "--config"]
    assert with_paths(args) == expected


def test_module_is_a_door_too(elsewhere: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "seglab", "fot"], capture_output=True, text=True, cwd=elsewhere
    )
    assert done.stderr == "seglab: no command 'fot'; did you mean 'fit'?\n"
