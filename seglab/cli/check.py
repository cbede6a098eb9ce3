"""Tell mistakes in configs and arguments before torch is loaded.

Looked at are the keys at every depth, class paths, and plain values. What the sources do not tell
is left to the real parser.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from seglab.cli.arguments import CLASS_PATH, ConfigError, Given, collect, split_options
from seglab.cli.plain_types import fits, wanted
from seglab.cli.signatures import Parameter, Signature, find_signature
from seglab.cli.source_code import NoSuchNameError, UnreadableError

SECTIONS = {
    "trainer": "lightning.pytorch.Trainer",
    "data": None,  # whatever its class_path says
    "model": "seglab.task.SegmentationTask",
    "scale_equalization": "scale_equalization.ScaleEqualizationCallback",
    "speed": "seglab.training_speed.TrainingSpeed",
    "predictions": "seglab.reporting.predictions.PredictionWriter",
}
"""Sections of a config, and the class whose arguments they are."""

SINGLE = {
    "seed_everything": ["an integer", "true or false"],
    "without": None,
    "ckpt_path": None,
    "weights_only": None,
    "verbose": None,
    "return_predictions": None,
    "config": None,
    "c": None,
    "resume": None,
    "print_config": None,
}
"""Options that belong to no section, and what kind of value they take if it is a plain one."""

HOMES = {
    "data": "seglab.data",
    "model.optimizer": "torch.optim",
    "trainer.callbacks": "lightning.pytorch.callbacks",
    "trainer.logger": "lightning.pytorch.loggers",
}
"""Where classes that are named without a module are looked for."""

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml"}
"""What loggers need that is not installed with us."""

LINKED = ("num_classes", "class_names", "palette", "ignore_index")
"""Arguments of models that the data give."""


def check_arguments(args: list[str], is_whole: bool, needed: Sequence[str] = ()) -> Given:
    """Look at everything that a command is given.

    Args:
        args: With paths for all configs.
        is_whole: Whether the command takes these options only; others have some of their own.
        needed: Sections that there must be.

    Raises:
        FileNotFoundError: A config does not exist.
        ConfigError: With the place, and what may have been meant.
    """
    given = collect(args)
    options = split_options(args)
    stray = [value for option, value in options if not option]
    if is_whole and stray:
        raise ConfigError(f"{stray[0]!r} belongs to no option: write --SECTION.KEY VALUE.")
    for option, value in options:
        if value is None and "." in option:
            raise ConfigError(f"{option} needs a value.")
    check_sections(given, is_whole)
    for section in needed:
        if section not in given.tree:
            raise ConfigError(
                f"nothing says what the {section} is: give a config with --config FILE, one of your"
                " own or one that is shipped, such as quickstart."
            )
    return given


def check_sections(given: Given, is_whole: bool = True) -> None:
    """Look at a tree of sections.

    Raises:
        ConfigError: With the place, and what may have been meant.
    """
    for key, value in given.tree.items():
        if key in SECTIONS:
            Checker(given).check_section(key, value)
        elif key in SINGLE:
            kinds = SINGLE[key]
            if kinds is not None and not fits(value, kinds):
                raise ConfigError(f"{key}: expected {' or '.join(kinds)}, got {_shown(value)}.")
        elif is_whole or key in given.files:
            raise ConfigError(_unknown(given, key, [*SECTIONS, *SINGLE], "there is no"))


class Checker:
    """Walks through the tree of one command."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def check_section(self, key: str, value: Any) -> None:
        """Check one section."""
        path = SECTIONS[key]
        if value is not None and not isinstance(value, dict) and path is not None:
            raise ConfigError(f"{key} is a section: its keys are given as --{key}.KEY VALUE.")
        if path is None:
            self.check_object(value, key)
        elif value:
            with suppress(UnreadableError):
                self.check_keys(find_signature(path), value, key)

    def check_object(self, value: Any, place: str) -> None:
        """Check what may be a class path with its arguments, or several."""
        if isinstance(value, list):
            for each in value:
                self.check_object(each, place)
        elif isinstance(value, str) and (CLASS_PATH.fullmatch(value) or place in HOMES):
            self.check_object({"class_path": value}, place)
        elif isinstance(value, dict) and isinstance(value.get("class_path"), str):
            signature = self._class_of(value["class_path"], place)
            values = value.get("init_args") or {}
            if signature is not None and isinstance(values, dict):
                self.check_keys(signature, values, place)
                self._check_required(signature, values, place)

    def check_keys(self, signature: Signature, values: dict[str, Any], place: str) -> None:
        """Check the arguments of a known class."""
        for key, value in values.items():
            parameter = signature.parameters.get(key)
            if key == "help":  # --data.help CLASS, the parser's own
                continue
            if parameter is not None:
                self._check_value(parameter, value, f"{place}.{key}")
            elif not signature.is_open and (key not in LINKED or place == "data"):
                names = list(signature.parameters)
                what = f"{signature.name} takes no"
                raise ConfigError(_unknown(self.given, f"{place}.{key}", names, what))

    def _check_required(self, signature: Signature, values: dict[str, Any], place: str) -> None:
        """Look for arguments that nobody gives; those of factories are handed over later."""
        if not place.startswith("trainer.") and place not in ("model.network", "data"):
            return
        given = (*values, *LINKED) if place != "data" else values
        for key, parameter in signature.parameters.items():
            if parameter.default is None and key not in given:
                where = _where(self.given, place)
                raise ConfigError(f"{place}{where}: {signature.name} needs {key}: --{place}.{key}.")

    def _check_value(self, parameter: Parameter, value: Any, place: str) -> None:
        if isinstance(value, dict) and "class_path" not in value:
            if any(str(key).isdigit() for key in value) and not _is_mapping(parameter.annotation):
                raise ConfigError(f"{place} is a list, give it whole: --{place} '[a, b]'.")
            record = _record(parameter)
            if record is not None:
                self.check_keys(record, value, place)
            elif place in HOMES:
                raise ConfigError(f"{place} has no class to take {next(iter(value))!r}: name it.")
            return
        kinds = wanted(parameter.annotation, parameter.module)
        if kinds is None:
            self.check_object(value, place)
        elif not fits(value, kinds):
            where = _where(self.given, place)
            expected = " or ".join(kinds)
            raise ConfigError(f"{place}{where}: expected {expected}, got {_shown(value)}.")

    def _class_of(self, path: str, place: str) -> Signature | None:
        """Signature of a class; None where it cannot be read."""
        full = path if CLASS_PATH.fullmatch(path) else f"{HOMES.get(place, '')}.{path}"
        try:
            signature = find_signature(full)
            _require_package(signature.name, place)
            return signature
        except UnreadableError:
            return None
        except NoSuchNameError as error:
            near = get_close_matches(error.name, error.names, n=1)
            if full != path and not near and place != "data":
                return None  # of a module that the real parser may know
            hint = f"; did you mean {error.module}.{near[0]}?" if near else "."
            where = _where(self.given, place)
            raise ConfigError(f"{place}{where}: {error.module} has no {error.name}{hint}") from None


def _require_package(name: str, place: str) -> None:
    package = PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        install = package.replace("_", "-")
        raise ConfigError(
            f"{place}: the package {install} is not installed, and {name} needs it: "
            f"pip install {install}"
        )


def _record(parameter: Parameter) -> Signature | None:
    """Signature of the one class that an annotation names, for values given by their keys."""
    annotation = parameter.annotation
    if not isinstance(annotation, ast.Name):
        return None
    try:
        return find_signature(f"{parameter.module}.{annotation.id}")
    except (UnreadableError, NoSuchNameError):
        return None


def _is_mapping(annotation: ast.expr | None) -> bool:
    text = "" if annotation is None else ast.unparse(annotation)
    return annotation is None or "dict" in text.lower() or "mapping" in text.lower()


def _unknown(given: Given, place: str, names: Sequence[str], what: str) -> str:
    key = place.rpartition(".")[2]
    near = nearest(key, names)
    if near is None:
        shown = [name for name in names if name not in SINGLE or name in ("ckpt_path", "resume")]
        more = ", ..." if len(shown) > 15 else ""
        hint = f"known are {', '.join(shown[:15])}{more}."
    else:
        hint = f"did you mean {near!r}?"
    return f"{place}{_where(given, place)}: {what} {key!r}; {hint}"


def nearest(key: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant, by the whole of it or by one of its words.

    >>> nearest("weigth", ["ignore_index", "class_weight"])
    'class_weight'
    """
    whole = get_close_matches(key, names, n=1)
    if whole:
        return whole[0]
    words = {word: name for name in names for word in name.split("_")}
    near = get_close_matches(key, words, n=1, cutoff=0.75)
    return words[near[0]] if near else None


def _where(given: Given, place: str) -> str:
    return f" in {given.files[place]}" if place in given.files else ""


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
