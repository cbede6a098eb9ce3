"""Values that are wrong whatever the rest says, told before torch is loaded.

Numbers out of their bounds, files and folders that are not there, names of encoders that timm does
not have, words that the Trainer does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seglab.bounds import find_fault
from seglab.cli.arguments import ConfigError, Given
from seglab.cli.program import command_line

OWN_CHECKPOINTS = ("best", "last", "hpc")
"""What `ckpt_path` may be beside a file: Lightning finds them itself."""

ON_DISK = ("FolderDataModule", "ADE20KDataModule", "VOCAugDataModule", "CityscapesDataModule")
"""Data modules whose `root` must be there."""

KNOWN_PACKAGES = (
    *("seglab", "scale_equalization", "torch", "lightning", "albumentations", "timm"),
    "segmentation_models_pytorch",
)
"""Packages that add no models to timm when they are imported."""

WORDS = {
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.strategy": ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp", "deepspeed"),
    "trainer.profiler": ("simple", "advanced", "pytorch"),
}
"""The words that are mostly meant; others must stand somewhere in the Trainer's sources."""

PATTERNS = {
    "trainer.devices": (r"auto|-?\d+|\d+(, *\d+)*,?", "a number, auto, or a list such as '0,2'"),
    "trainer.val_check_interval": (r"\d+:\d\d:\d\d:\d\d|[\d.e+-]+", "a number or DD:HH:MM:SS"),
    "trainer.max_time": (r"\d+:\d\d:\d\d:\d\d", "DD:HH:MM:SS"),
}


def check_value(given: Given, value: Any, place: str) -> None:
    """Check one value of any section.

    Raises:
        ConfigError: With the place, the value and what it may be.
    """
    where = f" in {given.files[place]}" if place in given.files else ""
    fault = find_fault(place, value)
    if fault:
        raise ConfigError(fault.replace(place, place + where, 1))
    if not isinstance(value, str):
        return
    words = WORDS.get(place, (value.lower(),))
    if value.lower() not in words and "." not in value and value.lower() not in _trainer_words():
        near = get_close_matches(value.lower(), words, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f": mostly {', '.join(words)}."
        raise ConfigError(f"{place}{where}: there is no {value!r}{hint}")
    pattern, said = PATTERNS.get(place, (r"(?s).*", ""))
    if not re.fullmatch(pattern, value):
        raise ConfigError(f"{place}{where}: expected {said}, got {value!r}.")
    takes_weights = place == "model.weights" and "ckpt_path" not in given.tree
    if takes_weights and not Path(value).is_file():
        raise FileNotFoundError(
            f"{place}{where}: checkpoint {value} does not exist: check the path."
        )


def check_checkpoint(path: Any) -> None:
    """See that what `--ckpt_path` names is there; shards are a folder, others a URL.

    Raises:
        FileNotFoundError: It is not.
    """
    is_path = isinstance(path, str) and path not in OWN_CHECKPOINTS and "://" not in path
    if is_path and not Path(path).exists():
        raise FileNotFoundError(f"ckpt_path: {path} does not exist: check the path.")


def check_root(data: Any) -> None:
    """See that the folder of a data module with files is there.

    Raises:
        FileNotFoundError: It is not.
    """
    if not isinstance(data, dict) or not isinstance(data.get("class_path"), str):
        return
    name = data["class_path"].rpartition(".")[2]
    root = (data.get("init_args") or {}).get("root")
    if name not in ON_DISK or not isinstance(root, str) or Path(root).is_dir():
        return
    cure = "check the path"
    if name != "FolderDataModule":
        cure += f", or see what `{command_line()} prepare` with the same config fetches"
    here = "" if Path(root).is_absolute() else f" in {Path.cwd()}"
    raise FileNotFoundError(f"data.root: there is no folder {root}{here}; {cure}.")


def check_encoder(tree: dict[str, Any], name: Any, place: str) -> None:
    """See that timm has an encoder of this name, as far as its sources tell.

    Raises:
        ConfigError: It has not; names those that are near.
    """
    if name is None or str(name).startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    foreign = [path for path in _class_paths(tree) if path.split(".")[0] not in KNOWN_PACKAGES]
    model = str(name).partition(".")[0]
    registered, mentioned = _encoders()
    if foreign or not registered or model in mentioned:
        return
    near = get_close_matches(model, sorted(registered), n=5, cutoff=0.5)
    raise ConfigError(
        f"{place}: timm has no model {model!r}; nearest: {', '.join(near) or 'none'} "
        f"(`{command_line()} models` lists all)"
    )


def _class_paths(tree: Any) -> Iterator[str]:
    """All class paths that a config names with their packages."""
    if isinstance(tree, dict):
        if isinstance(tree.get("class_path"), str) and "." in tree["class_path"]:
            yield tree["class_path"]
        for value in tree.values():
            yield from _class_paths(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _class_paths(value)


@cache
def _encoders() -> tuple[set[str], set[str]]:
    """Models that timm's sources register, and every name in them that may be one."""
    texts = _sources("timm", "models/*.py")
    registered = {name for t in texts for name in re.findall(r"@register_model\s+def (\w+)", t)}
    return registered, registered | _quoted(texts)


@cache
def _trainer_words() -> set[str]:
    """Every word in the sources of the Trainer that may name a strategy or the like."""
    parts = ("strategies", "accelerators", "trainer/connectors", "_graveyard")
    return _quoted([t for part in parts for t in _sources("lightning", f"pytorch/{part}/*.py")])


def _sources(package: str, pattern: str) -> list[str]:
    spec = find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    files = [file for folder in folders for file in Path(folder).glob(pattern)]
    return [file.read_text(encoding="utf-8") for file in files]


def _quoted(texts: list[str]) -> set[str]:
    return {word for text in texts for word in re.findall(r"""['"](\w+)['"]""", text)}
