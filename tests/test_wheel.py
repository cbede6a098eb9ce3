"""What is installed: the wheel holds every package and config, and its command finds them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def test_package_list_is_that_of_the_tree() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.partition("packages = [")[2].partition("]")[0]
    named = {line.strip(' ",') for line in listed.splitlines() if line.strip()}
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "seglab").rglob("*.py")
    }
    configs = {path.parent.relative_to(ROOT).parts for path in (ROOT / "configs").rglob("*.yaml")}
    assert named == found | {".".join(["seglab", *parts]) for parts in configs}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the project, built without a network."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("seglab", "configs"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(folder / "dist")],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_code_and_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "seglab").rglob("*.py")}
    configs = {
        f"seglab/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "configs").rglob("*.yaml")
    }
    pages = {f"seglab/reporting/pages/{name}" for name in ("page.html", "page.css", "card.md")}
    assert names >= code | configs | pages | {"seglab/py.typed"}
    assert {name for name in names if name.endswith(".yaml")} == configs


@pytest.mark.slow
def test_installed_configs_are_found_by_name_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    entry = next((tmp_path / "site").glob("*.dist-info/entry_points.txt")).read_text()
    assert "seglab = seglab.cli:main" in entry
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from seglab.cli.shipped_configs import find_config\n"
        "from seglab.cli.run_folder import experiment_name\n"
        "path = find_config('ade20k/upernet_swin_t')\n"
        "print(path, experiment_name(str(path)))"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=elsewhere, capture_output=True, text=True
    )
    path, name = done.stdout.split()
    assert path == str(tmp_path / "site/seglab/configs/ade20k/upernet_swin_t.yaml")
    assert name == "ade20k/upernet_swin_t"
