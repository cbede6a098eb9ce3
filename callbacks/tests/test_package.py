"""What importing costs, and which names a stranger may rely on."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import scale_equalization

PACKAGE = Path(scale_equalization.__file__).parent
PROJECT = PACKAGE.parent


def test_import_does_not_import_lightning():
    code = "import scale_equalization, sys; print([m for m in sys.modules if 'lightning' in m])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_every_public_name_exists():
    assert [n for n in scale_equalization.__all__ if not hasattr(scale_equalization, n)] == []
    with pytest.raises(AttributeError, match="has no attribute 'fold'"):
        _ = scale_equalization.fold


def test_version_is_the_same_everywhere_and_has_a_changelog_entry():
    project = (PROJECT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(\d+\.\d+\.\d+)"$', project, re.MULTILINE)[1]
    assert scale_equalization.__version__ == version
    assert f"\n## {version}\n" in (PROJECT / "CHANGELOG.md").read_text()


def test_every_test_of_the_overview_exists():
    tests = PROJECT / "tests"
    named = set(re.findall(r"`(test_\w+)`", (tests / "README.md").read_text()))
    code = "".join(path.read_text() for path in tests.glob("test_*.py"))
    assert len(named) > 60
    assert named <= set(re.findall(r"def (test_\w+)", code))


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist of a copy of the project, and the wheel made from that sdist, without a network."""
    project = folder / "project"
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "dist")
    shutil.copytree(PROJECT, project, ignore=ignored)
    code = "import sys, setuptools.build_meta as b; print(b.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", code, str(folder), cwd=project)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    code = code.replace("sdist", "wheel")
    run(sys.executable, "-c", code, str(folder), cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_from_the_sdist_works_in_an_empty_environment(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    _, wheel = build(tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(p.relative_to(PROJECT)) for p in PACKAGE.rglob("*.py")}
    assert sources | {"scale_equalization/py.typed"} <= names
    assert not any(name.startswith(("tests", "examples")) for name in names)
    empty = tmp_path / "empty"
    venv.create(empty, with_pip=True, symlinks=True)
    python = str(empty / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=empty)
    borrowed = str(Path(__import__("torch").__file__).parents[1])  # torch is too large to install
    code = (  # behind the environment's own packages: what is borrowed may hold this one as well
        f"import sys; sys.path.append({borrowed!r}); "
        "import importlib.metadata as m, scale_equalization as s; "
        "print(m.version('scale-equalization'), s.__version__, s.__file__); "
        "print([getattr(s, name) for name in s.__all__] and 'complete')"
    )
    output = run(python, "-c", code, cwd=empty, CUDA_VISIBLE_DEVICES="")
    version, file = scale_equalization.__version__, str(empty)
    assert output.startswith(f"{version} {version} {file}"), output
    assert output.strip().endswith("complete")
