"""`fit --help`: a screen by sections, with the arguments of the classes that the config names."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from seglab.cli.arguments import CLASS_PATH, Given
from seglab.cli.check import HOMES, LINKED, SECTIONS
from seglab.cli.program import command_line
from seglab.cli.signatures import Signature, find_signature
from seglab.cli.source_code import NoSuchNameError, UnreadableError

WIDTH, INDENT = 79, 4

OPTIONS = {
    "--config NAME": "a file or a shipped config; of several, later ones win",
    "--ckpt_path FILE": "start from a checkpoint, in a new folder",
    "--seed_everything N": "seed of weights, order, augmentation and dropout",
    "--without [SECTION]": "leave a callback's section out",
    "--print_config": "print every value and stop",
    "--traceback": "show where an error came from",
}
RESUME = {"--resume FOLDER": "continue a run in its folder, exactly where it was saved"}
INPUT = {"--input FILES": "label any files: see predict --input --help"}

COMMON = (
    *("max_steps", "max_epochs", "devices", "strategy", "precision", "val_check_interval"),
    *("check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "logger"),
    *("gradient_clip_val", "callbacks", "log_every_n_steps", "default_root_dir"),
)
"""Arguments of the Trainer on the first screen; the rest is in `--help=all`."""

HANDED_OVER = ("params", "optimizer", "in_channels", *LINKED)
"""Arguments that the program fills in where classes are put together, if they have no default."""


class Group(NamedTuple):
    """Arguments below one place of the config.

    Attributes:
        place: Such as `model.network`.
        signature: Of the class that is there.
        values: What the config sets.
    """

    place: str
    signature: Signature
    values: dict[str, Any]


def help_text(command: str, summary: str, given: Given, shows_all: bool) -> str:
    """What `--help` prints.

    Args:
        command: Such as "fit".
        summary: What it does.
        given: Configs and arguments beside `--help`.
        shows_all: Whether every argument gets a line of its own.
    """
    options = OPTIONS | {"fit": RESUME, "predict": INPUT}.get(command, {})
    lines = [
        f"usage: {command_line()} {command} --config NAME [--SECTION.KEY VALUE ...]",
        f"{summary}",
        "",
        *(f"{option:<20} {text}" for option, text in options.items()),
    ]
    lines.append("")
    for group in groups(given):
        lines.append(_headline(group))
        lines += _one_by_one(group) if shows_all else _in_a_row(group)
    if "data" not in given.tree:
        lines += ["", "Add --config NAME to see the arguments of the classes that it names."]
    if not shows_all:
        lines += ["", "--help=all: one line for every key, with its meaning and default."]
    return "\n".join(lines)


def groups(given: Given) -> Iterator[Group]:
    """Every class that the sections name, the sections themselves included."""
    for section, path in SECTIONS.items():
        value = given.tree.get(section)
        if path is None:
            yield from _of_value(section, value)
        else:
            signature = _signature(section, path)
            values = value if isinstance(value, dict) else {}
            if signature is not None:
                yield Group(section, signature, values)
                for key, inner in values.items():
                    yield from _of_value(f"{section}.{key}", inner)


def _of_value(place: str, value: Any) -> Iterator[Group]:
    if isinstance(value, list):
        for each in value:
            yield from _of_value(place, each)
        return
    path = value.get("class_path") if isinstance(value, dict) else value
    signature = _signature(place, path) if isinstance(path, str) else None
    if signature is None:
        return
    values = (value.get("init_args") or {}) if isinstance(value, dict) else {}
    yield Group(place, signature, values)
    for key, inner in values.items():
        yield from _of_value(f"{place}.{key}", inner)


def _signature(place: str, path: str) -> Signature | None:
    if not CLASS_PATH.fullmatch(path):
        if place not in HOMES:
            return None
        path = f"{HOMES[place]}.{path}"
    try:
        return find_signature(path)
    except (UnreadableError, NoSuchNameError):
        return None


def _headline(group: Group) -> str:
    text = f"--{group.place}.KEY  {group.signature.name}: {group.signature.summary}".rstrip(": ")
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3].rstrip()}..."


def _keys(group: Group) -> list[str]:
    inner = group.place.count(".") > 0
    hidden = HANDED_OVER if inner else LINKED if group.place == "model" else ()
    return [
        key
        for key, parameter in group.signature.parameters.items()
        if key not in hidden or (key == "in_channels" and parameter.default is not None)
    ]


def _in_a_row(group: Group) -> list[str]:
    keys = _keys(group)
    if group.place == "trainer":
        keys = [key for key in keys if key in COMMON or key in group.values]
    words = ", ".join(_with_value(key, group.values) for key in keys)
    left_out = len(_keys(group)) - len(keys)
    words += f" and {left_out} more" if left_out else ""
    indent = " " * INDENT
    return textwrap.wrap(words, WIDTH, initial_indent=indent, subsequent_indent=indent)


def _with_value(key: str, values: dict[str, Any]) -> str:
    """`key=value` where the config has a short one."""
    if key not in values or isinstance(values[key], dict):
        return key
    text = _yaml(values[key])
    return f"{key}={text}" if len(text) <= 20 and " " not in text else key


def _one_by_one(group: Group) -> list[str]:
    lines = []
    for key in _keys(group):
        parameter = group.signature.parameters[key]
        value = "required" if parameter.default is None else parameter.default
        if key in group.values and not isinstance(group.values[key], dict):
            value = f"{_yaml(group.values[key])} (config)"
        text = f"{value}: {parameter.help}" if parameter.help else value
        lines += textwrap.wrap(
            f"{key} = {text}",
            WIDTH,
            initial_indent=" " * INDENT,
            subsequent_indent=" " * 2 * INDENT,
        )
    return lines


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace(", ", ",")
