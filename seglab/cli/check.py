"""Tell mistakes in configs and arguments before torch is loaded.

Looked at are the keys at every depth, class paths, and plain values. What the sources do not tell
is left to the real parser.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from seglab.cli.arguments import CLASS_PATH, ConfigError, Given, collect, split_options
from seglab.cli.plain_types import INTEGER, SWITCH, Kind, fits, said, wanted
from seglab.cli.signatures import Parameter, Signature, find_signature
from seglab.cli.source_code import NoSuchModuleError, NoSuchNameError, UnreadableError
from seglab.cli.values import KNOWN_PACKAGES, check_checkpoint, check_encoder, check_value

SECTIONS = {
    "trainer": "lightning.pytorch.Trainer",
    "data": None,  # whatever its class_path says
    "model": "seglab.task.SegmentationTask",
    "scale_equalization": "scale_equalization.ScaleEqualizationCallback",
    "speed": "seglab.training_speed.TrainingSpeed",
    "predictions": "seglab.reporting.predictions.PredictionWriter",
}
"""Sections of a config, and the class whose arguments they are."""

OPTIONAL = ("scale_equalization", "speed", "predictions")
"""Sections that `--without` can leave out."""

SINGLE: dict[str, list[Kind] | None] = {
    "seed_everything": [INTEGER, SWITCH],
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
    "model.network": "seglab.models",
    "model.network.encoder": "seglab.models",
    "model.network.head": "seglab.models.heads",
    "model.network.auxiliary": "seglab.models.heads",
    "model.network.neck": "seglab.models.necks",
    "model.loss": "seglab.losses",
    "model.optimizer": "torch.optim",
    "model.scheduler": "seglab.optim",
    "trainer.callbacks": "lightning.pytorch.callbacks",
    "trainer.logger": "lightning.pytorch.loggers",
}
"""Where classes that are named without a module are looked for."""

ELSEWHERE = {
    "model.scheduler": ("torch.optim.lr_scheduler",),
    "model.loss": ("torch.nn", "segmentation_models_pytorch.losses"),
}
"""Where else the parser finds classes that are named without a module."""

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml"}
"""What loggers need that is not installed with us."""

LINKED = ("num_classes", "class_names", "palette", "ignore_index")
"""Arguments of models that the data give."""


def check_arguments(
    args: list[str], is_whole: bool, needed: Sequence[str] = (), own: Sequence[str] = ()
) -> Given:
    """Look at everything that a command is given.

    Args:
        args: With paths for all configs.
        is_whole: Whether the command takes these options only; others have some of their own.
        needed: Sections that there must be. Where it is the data alone, what configs say in other
            sections is not looked at: it may not even be installed here.
        own: Options of the command beside these, which may have been meant.

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
    skipped: set[str] = set()
    if tuple(needed) == ("data",):
        typed = {option[2:].partition(".")[0] for option, _ in options}
        skipped = {*SECTIONS} - {"data"} - typed
    check_sections(given, is_whole, own, skipped)
    check_checkpoint(given.tree.get("ckpt_path"))
    for section in needed:
        if section not in given.tree:
            raise ConfigError(
                f"nothing says what the {section} is: give a config with --config FILE, one of your"
                " own or one that is shipped, such as quickstart."
            )
    return given


def check_sections(
    given: Given,
    is_whole: bool = True,
    own: Sequence[str] = (),
    skipped: Collection[str] = (),
) -> None:
    """Look at a tree of sections.

    Raises:
        ConfigError: With the place, and what may have been meant.
    """
    for key, value in given.tree.items():
        if key in skipped:
            continue
        if key in SECTIONS:
            Checker(given).check_section(key, value)
        elif key in SINGLE:
            _check_single(given, key, value)
        elif is_whole or key in given.files:
            raise ConfigError(_unknown(given, key, [*own, *SECTIONS, *SINGLE], "there is no"))


def _check_single(given: Given, key: str, value: Any) -> None:
    """Check an option that belongs to no section."""
    kinds = SINGLE[key]
    if key == "without":
        names = value if isinstance(value, list) else [value]
        wrong = [name for name in names if name not in OPTIONAL]
        if wrong or not isinstance(value, list):
            near = nearest(str(wrong[0]), OPTIONAL) if wrong else value
            hint = f"did you mean '[{near}]'?" if near else f"it takes {', '.join(OPTIONAL)}."
            raise ConfigError(f"without: expected a list of sections, got {_shown(value)}; {hint}")
    elif kinds is not None and not fits(value, kinds):
        raise ConfigError(f"{key}: expected {said(kinds)}, got {_shown(value)}.")
    check_value(given, value, key)


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
            if signature.name == "TimmEncoder" and key == "name":
                check_encoder(self.given.tree, value, f"{place}.{key}")
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
        kinds = wanted(parameter.annotation, parameter.module)
        if isinstance(value, dict) and "class_path" not in value:
            self._check_table(parameter, kinds, value, place)
            return
        if kinds and not fits(value, kinds):
            raise self._unfit(kinds, value, place)
        check_value(self.given, value, place)
        if not (isinstance(value, str) and any(kind.takes_text for kind in kinds)):
            self.check_object(value, place)

    def _check_table(
        self, parameter: Parameter, kinds: list[Kind], value: dict[str, Any], place: str
    ) -> None:
        """Check a value given by keys: a table, arguments of a class, or a list by its indices."""
        if any(str(key).isdigit() for key in value) and not _is_mapping(parameter.annotation):
            raise ConfigError(f"{place} is a list, give it whole: --{place} '[a, b]'.")
        record = _record(parameter)
        if record is not None:
            self.check_keys(record, value, place)
        elif {"resume", "ckpt_path"} & {*self.given.tree}:
            return  # the run or checkpoint brings the class
        elif place in HOMES:
            raise ConfigError(f"{place} has no class to take {next(iter(value))!r}: name it.")
        elif kinds and not fits(value, kinds):
            raise self._unfit(kinds, value, place)

    def _unfit(self, kinds: list[Kind], value: Any, place: str) -> ConfigError:
        words = [kind.said.strip("'") for kind in kinds if kind.said.startswith("'")]
        near = get_close_matches(str(value), words, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        where = _where(self.given, place)
        return ConfigError(f"{place}{where}: expected {said(kinds)}, got {_shown(value)}{hint}")

    def _class_of(self, path: str, place: str) -> Signature | None:
        """Signature of a class; None where it cannot be read."""
        is_full = CLASS_PATH.fullmatch(path) is not None
        full = path if is_full else f"{HOMES.get(place, '')}.{path}"
        where = _where(self.given, place)
        try:
            signature = find_signature(full)
            _require_package(signature.name, place)
            return signature
        except NoSuchModuleError as error:
            if not is_full or error.module != path.rpartition(".")[0]:
                return None  # the module is there, what it imports is not
            known = error.names or KNOWN_PACKAGES
            near = get_close_matches(error.module, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": {error.module} cannot be imported."
            raise ConfigError(f"{place}{where}: there is no class {path}{hint}") from None
        except UnreadableError:
            return None
        except NoSuchNameError as error:
            if not is_full and find_elsewhere(place, path):
                return None
            near = get_close_matches(error.name, error.names, n=1)
            hint = f"; did you mean {error.module}.{near[0]}?" if near else "."
            more = "" if is_full or near else " Classes of other modules are given by import path."
            raise ConfigError(
                f"{place}{where}: {error.module} has no {error.name}{hint}{more}"
            ) from None


def find_elsewhere(place: str, name: str) -> bool:
    """Whether a class without its module is one that the parser finds outside of its home."""
    for home in ELSEWHERE.get(place, ()):
        with suppress(UnreadableError, NoSuchNameError):
            find_signature(f"{home}.{name}")
            return True
    return False


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
