"""Configs by name: `--config ade20k/upernet_swin_t` is a file on disk or one that is shipped."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path


def config_folder() -> Path:
    """Where the shipped configs are: in the wheel below the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of all shipped configs, as `--config` takes them."""
    root = config_folder()
    return sorted(
        path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")
    )


def find_config(name: str) -> Path:
    """Path of a config.

    Args:
        name: A file, which wins, or the name of a shipped config; `configs/` before it and `.yaml`
            behind it may be there or not.

    Raises:
        FileNotFoundError: There is neither.

    >>> find_config("quickstart").name, find_config("configs/quickstart.yaml").name
    ('quickstart.yaml', 'quickstart.yaml')
    """
    path = Path(name)
    if path.exists():
        return path
    short = path.with_suffix("") if path.suffix in (".yaml", ".yml") else path
    key = short.as_posix().removeprefix("configs/")
    shipped = shipped_configs()
    if key in shipped:
        return config_folder() / f"{key}.yaml"
    hint = _hint(key, shipped, path)
    raise FileNotFoundError(f"config {name} does not exist, here or among those shipped{hint}")


def _hint(key: str, shipped: list[str], path: Path) -> str:
    folder = path.parent
    beside = [p.as_posix() for p in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = get_close_matches(path.as_posix(), beside, n=1, cutoff=0.8)
    near = near or get_close_matches(key, shipped, n=1, cutoff=0.6)
    near = near or [name for name in shipped if name.endswith(f"/{key}")][:1]
    return f": did you mean {near[0]}?" if near else ": check the path."


def with_paths(args: list[str]) -> list[str]:
    """Arguments of a command with a path for every `--config`."""
    found: list[str] = []
    is_name = False
    for arg in args:
        option, equals, value = arg.partition("=")
        if is_name:
            found.append(str(find_config(arg)))
        elif equals and option in ("--config", "-c"):
            found.append(f"{option}={find_config(value)}")
        else:
            found.append(arg)
        is_name = not is_name and arg in ("--config", "-c")
    return found
