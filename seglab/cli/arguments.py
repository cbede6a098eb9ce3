"""Configs and command-line values as one tree of plain values, before any class is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from seglab.sentences import listed

NESTED = ("class_path", "init_args", "dict_kwargs")
N_SHOWN = 8  # keys that a later config overrides
CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class Given(NamedTuple):
    """What a user typed and wrote.

    Attributes:
        tree: Sections with their values; later ones have won.
        files: Config that a dotted key was last set in; keys of the command line have none.
        overridden: For every config, what it changes of what was given before it, in one line.
    """

    tree: dict[str, Any]
    files: dict[str, str]
    overridden: list[str]


class ConfigError(Exception):
    """A config or argument that cannot be right."""


def read_config(path: Path) -> dict[str, Any]:
    """Read one config.

    Raises:
        FileNotFoundError: It does not exist.
        ConfigError: It is no YAML, or not sections with values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist: check the path.")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config {path} must hold sections such as `trainer:` and `model:`.")
    return content


def collect(args: list[str]) -> Given:
    """Merge configs and `--section.key value` arguments in their order.

    Args:
        args: Of a command, with paths for all configs.

    Raises:
        FileNotFoundError: A config does not exist.
        ConfigError: One cannot be read, or an argument says nothing of a place.
    """
    given = Given({}, {}, [])
    for option, value in split_options(args):
        if option in ("--config", "-c"):
            content = read_config(Path(str(value)))
            before, new = dict(_leaves(given.tree)), dict(_leaves(content))
            changed = [key for key in new if key in before and before[key] != new[key]]
            if changed:
                given.overridden.append(_describe_changes(str(value), changed, before, new))
            merge(given.tree, content)
            given.files.update(dict.fromkeys(_dotted(content), str(value)))
        elif option.startswith("--"):
            key = option[2:].removesuffix("+")
            given.files.pop(key, None)
            _set(given.tree, key.split("."), _parse(value), appends=option.endswith("+"), key=key)
    return given


def split_options(args: list[str]) -> list[tuple[str, str | None]]:
    """Options with their values, in either spelling; None where there is no value.

    >>> split_options(["--a.b", "1", "--c=2", "--d"])
    [('--a.b', '1'), ('--c', '2'), ('--d', None)]
    """
    found: list[tuple[str, str | None]] = []
    index = 0
    while index < len(args):
        option, equals, value = args[index].partition("=")
        has_next = index + 1 < len(args) and not re.match(r"--?[A-Za-z]", args[index + 1])
        if not option.startswith("-"):
            found.append(("", args[index]))
        elif equals:
            found.append((option, value))
        elif has_next:
            found.append((option, args[index + 1]))
            index += 1
        else:
            found.append((option, None))
        index += 1
    return found


def _parse(text: str | None) -> Any:
    """A value as YAML reads it."""
    if text is None:
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def merge(tree: dict[str, Any], new: dict[str, Any]) -> None:
    """Put values over those of a tree, in place; those of a class go when another takes its place.

    A key that ends in + appends to a list.

    >>> tree = {"trainer": {"callbacks": ["a"]}}
    >>> merge(tree, {"trainer": {"callbacks+": ["b"], "max_steps": 2}})
    >>> tree
    {'trainer': {'callbacks': ['a', 'b'], 'max_steps': 2}}
    """
    for key, value in new.items():
        if str(key).endswith("+"):
            _put(tree, str(key)[:-1], value, appends=True)
            continue
        old = tree.get(str(key))
        if isinstance(old, str) and isinstance(value, dict) and "class_path" not in value:
            old = tree[str(key)] = {"class_path": old}
        if isinstance(old, dict) and isinstance(value, dict):
            if value.get("class_path", old.get("class_path")) != old.get("class_path"):
                old.pop("init_args", None)
            merge(old, value)
        else:
            tree[str(key)] = json.loads(json.dumps(value, default=str))  # a copy


def _set(node: dict[str, Any], parts: list[str], value: Any, appends: bool, key: str) -> None:
    """Put a value at a place; `init_args` may be left out of it."""
    name, *rest = parts
    if "class_path" in node and name not in NESTED:
        node = node.setdefault("init_args", {})
    if not rest:
        _put(node, name, value, appends)
        return
    child = node.get(name)
    if isinstance(child, list) and child and isinstance(child[-1], str):
        if rest[0].isdigit():
            raise ConfigError(f"{key}: {name} is a list, give it whole: --{name} '[a, b]'.")
        child[-1] = {"class_path": child[-1]}
    if isinstance(child, list) and child and isinstance(child[-1], dict):
        child = child[-1]
    elif isinstance(child, str):
        child = node[name] = {"class_path": child}
    elif not isinstance(child, dict):
        child = node[name] = {}
    _set(child, rest, value, appends, key)


def _put(node: dict[str, Any], name: str, value: Any, appends: bool) -> None:
    old = node.get(name)
    if appends:
        listed = old if isinstance(old, list) else [] if old is None else [old]
        node[name] = [*listed, *(value if isinstance(value, list) else [value])]
    elif isinstance(value, dict) and isinstance(old, dict):
        merge(node, {name: value})
    elif isinstance(old, dict) and isinstance(value, str) and CLASS_PATH.fullmatch(value):
        node[name] = {"class_path": value}
    elif name == "class_path" and node.get("class_path") != value:
        node.pop("init_args", None)
        node[name] = value
    else:
        node[name] = value


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys as arguments name them, with their plain values and lists."""
    for key, value in tree.items():
        place = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, dict):
            yield from _leaves(value, place)
        else:
            yield place, json.loads(json.dumps(value, default=str))


def _describe_changes(
    file: str, keys: list[str], before: dict[str, Any], new: dict[str, Any]
) -> str:
    shown = [f"{key} ({_short(before[key])} -> {_short(new[key])})" for key in keys]
    return f"{file} comes later and overrides {listed(shown, N_SHOWN)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 30 else f"{text[:27]}..."


def _dotted(content: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key of a config as an argument names it."""
    found: list[str] = []
    for key, value in content.items():
        place = prefix if key == "init_args" else f"{prefix}.{key}".lstrip(".")
        found.append(place)
        if isinstance(value, dict):
            found += _dotted(value, place)
    return found
