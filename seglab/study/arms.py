"""Arms: what is varied, as overrides of a config by section."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Overrides = dict[str, Any]
"""Nested values of a config; a key that ends in + appends to a list."""

EXPLICIT = "seglab.study.explicit.ExplicitEqualization"

BUILT_IN: dict[str, Overrides] = {
    "off": {"scale_equalization": {"mode": "off"}},
    "fold": {"scale_equalization": {"mode": "fold"}},
    "reparametrize": {"scale_equalization": {"mode": "reparametrize"}},
    "placebo": {"scale_equalization": {"mode": "fold", "placebo": True}},
    "preserve_norm": {"scale_equalization": {"mode": "fold", "preserve_norm": True}},
    "explicit": {
        "scale_equalization": {"mode": "off"},
        "trainer": {"callbacks+": [{"class_path": EXPLICIT}]},
    },
}
"""The initializer, its controls, and the reference whose dynamics it stands for."""

NAME = re.compile(r"(?!\.+$)[\w.][\w.,=+-]{0,99}")
"""Of an arm, hence of a folder, which is deleted before a run: `..` would be another one."""
NESTED = ("class_path", "init_args", "dict_kwargs")


class StudyError(Exception):
    """A study that cannot be planned, continued or compared as asked."""


def read_arms(given: Sequence[str]) -> dict[str, Overrides]:
    """Arms by name.

    Args:
        given: Names of built-in arms, and YAML files that map a name to overrides.

    Raises:
        StudyError: A name that is unknown, repeated or no name of a folder; a file of another form.

    >>> read_arms(["off", "fold"])["fold"]
    {'scale_equalization': {'mode': 'fold'}}
    """
    arms: dict[str, Overrides] = {}
    for item in given:
        is_file = item.endswith((".yaml", ".yml"))
        for name, overrides in (_read_file(Path(item)) if is_file else _built_in(item)).items():
            if name in arms:
                raise StudyError(f"--arms: {name} is given twice; name each arm once.")
            arms[name] = overrides
    return arms


def _built_in(name: str) -> dict[str, Overrides]:
    if name not in BUILT_IN:
        raise StudyError(
            f"--arms: there is no arm {name!r}; there are {', '.join(BUILT_IN)}, and files of your"
            " own that end in .yaml."
        )
    return {name: BUILT_IN[name]}


def _read_file(path: Path) -> dict[str, Overrides]:
    if not path.is_file():
        raise StudyError(f"--arms: there is no file {path}: check the path.")
    try:
        # Not yet as values: of two equal keys YAML keeps the last, and `off` and `on` are truth.
        content = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"--arms: {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, yaml.MappingNode) or not content.value:
        raise StudyError(f"--arms: {path} must map names of arms to sections of a config.")
    arms: dict[str, Overrides] = {}
    for key, value in content.value:
        name = _name(key.value, path)
        if name in arms:
            raise StudyError(f"--arms: {name} is given twice in {path}; name each arm once.")
        arms[name] = _overrides(name, yaml.SafeLoader("").construct_document(value), path)
    return arms


def _name(key: Any, path: Path) -> str:
    if not NAME.fullmatch(str(key)):
        raise StudyError(
            f"--arms: {str(key)!r} in {path} cannot be the name of a folder: at most 100 letters,"
            " digits and _.,=+-, not dots alone"
        )
    return str(key)


def _overrides(name: str, value: Any, path: Path) -> Overrides:
    if value is None:
        return {}
    if isinstance(value, str) and value in BUILT_IN:
        return BUILT_IN[value]
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise StudyError(
            f"--arms: {name} in {path} must hold sections such as `model:`, or be the name of a"
            f" built-in arm; it is {value!r}."
        )
    return value


def vary(
    arms: Mapping[str, Overrides], variations: Sequence[str], config: Mapping[str, Any]
) -> dict[str, Overrides]:
    """Cross every arm with every value of every variation.

    Args:
        arms: By name.
        variations: Such as "model.optimizer.init_args.lr=0.001,0.003"; values as in YAML.
        config: Tells where `init_args` has been left out.

    Raises:
        StudyError: A variation of another form.

    >>> crossed = vary({"off": {}}, ["model.lr=0.1,0.2"], {})
    >>> crossed["off,lr=0.2"], list(crossed)
    ({'model': {'lr': 0.2}}, ['off,lr=0.1', 'off,lr=0.2'])
    """
    keys, choices = zip(*map(_variation, variations), strict=True) if variations else ((), ())
    lasts = [key.rpartition(".")[2] for key in keys]
    labels = [
        last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)
    ]
    crossed: dict[str, Overrides] = {}
    for name, overrides in arms.items():
        for values in itertools.product(*choices):
            tree = completed(overrides, config)
            words = [name]
            for key, label, value in zip(keys, labels, values, strict=True):
                tree = joined(tree, completed(_nested(key.split("."), value), config))
                words.append(f"{label}={value}")
            label = ",".join(words)
            if not NAME.fullmatch(label):
                raise StudyError(
                    f"--vary: {label!r} cannot be the name of a folder: write such values into an"
                    " arms file, where each arm has a name."
                )
            crossed[label] = tree
    return crossed


def completed(overrides: Overrides, config: Any) -> Overrides:
    """Overrides with `init_args` put in where the config has a class and they leave it out.

    A class may be there by its path alone.

    >>> completed({"data": {"seed": 5}}, {"data": {"class_path": "x.Data"}})
    {'data': {'init_args': {'seed': 5}}}
    """
    path_alone = {"class_path": config} if isinstance(config, str) else {}
    node = config if isinstance(config, dict) else path_alone
    if "class_path" in node and not set(overrides) <= set(NESTED):
        return {"init_args": completed(overrides, node.get("init_args"))}
    return {
        key: completed(value, node.get(key)) if isinstance(value, dict) else value
        for key, value in overrides.items()
    }


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> Overrides:
    """Two overrides as one; the second wins."""
    found: Overrides = dict(first)
    for key, value in second.items():
        old = found.get(key)
        found[key] = (
            joined(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return found


def _variation(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    if not equals or not key or not values:
        raise StudyError(f"--vary {text}: write KEY=VALUE,VALUE,...")
    try:
        listed = yaml.safe_load(values) if values.startswith("[") else values.split(",")
    except yaml.YAMLError as error:
        raise StudyError(
            f"--vary {text}: the values are no YAML list: close the bracket"
        ) from error
    found = [_value(value) for value in listed]
    if len(set(map(str, found))) < len(found):
        raise StudyError(f"--vary {text}: a value is given twice.")
    return key, found


def _value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "e" in value.lower() else yaml.safe_load(value)  # YAML: no 1e-3
    except ValueError:
        return yaml.safe_load(value)


def _nested(parts: Sequence[str], value: Any) -> Overrides:
    name, *rest = parts
    return {name: _nested(rest, value) if rest else value}
