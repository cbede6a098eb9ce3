"""Annotations of plain values: numbers, switches, words, lists; classes are not judged."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from seglab.cli.source_code import UnreadableError, find_alias


@dataclass(frozen=True)
class Kind:
    """One of the kinds of values that an annotation allows.

    Attributes:
        said: In words, such as "an integer".
        fits: Whether a value, as YAML reads it, is of this kind.
        plural: Of several, such as "integers".
        takes_text: Whether any word is a value of this kind.
        may_be_class: Whether a class path may be meant, alone or in a list.
    """

    said: str
    fits: Callable[[Any], bool]
    plural: str = ""
    takes_text: bool = False
    may_be_class: bool = False


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool | list | dict) or value is None:
        return False
    try:  # PyYAML takes 1e-3 for a word
        float(value)
    except ValueError:
        return False
    return True


INTEGER = Kind("an integer", _is_integer, "integers")
NUMBER = Kind("a number", _is_number, "numbers")
SWITCH = Kind("true or false", lambda value: isinstance(value, bool), "switches")
NULL = Kind("null", lambda value: value in (None, "null", "None"), "null")
TEXT = Kind("a text", lambda value: not isinstance(value, dict), "texts", takes_text=True)
ANYTHING = Kind("anything", lambda value: True, "values", takes_text=True)
CLASS = Kind("a class", lambda value: True, "classes", may_be_class=True)

NAMES = {
    "int": INTEGER,
    "float": NUMBER,
    "bool": SWITCH,
    "None": NULL,
    **dict.fromkeys(("str", "Path", "PathLike", "timedelta"), TEXT),
    **dict.fromkeys(("Any", "object"), ANYTHING),
}
NOT_TYPED = ("Tensor",)
"""Classes that no value on a command line or in a config can be."""

LISTS = ("list", "List", "Sequence", "Iterable", "Collection", "set", "frozenset")
TABLES = ("dict", "Dict", "Mapping", "MutableMapping")


def wanted(annotation: ast.expr | None, module: str = "") -> list[Kind]:
    """The kinds of values that an annotation allows.

    Args:
        annotation: Of an argument; without one, anything is allowed.
        module: Where it is written, for names that stand for others.

    >>> said(wanted(ast.parse("int | None", mode="eval").body))
    'an integer or null'
    >>> said(wanted(ast.parse("Literal['fold', 'off']", mode="eval").body))
    "'fold' or 'off'"
    >>> said(wanted(ast.parse("tuple[int, int] | None", mode="eval").body))
    'a list of 2 integers or null'
    """
    if annotation is None:
        return [ANYTHING]
    if isinstance(annotation, ast.Constant):
        return _of_constant(annotation, module)
    if isinstance(annotation, ast.BinOp):
        return _all_of([annotation.left, annotation.right], module)
    if isinstance(annotation, ast.Subscript):
        return _of_subscript(annotation, module)
    name = _last_name(annotation)
    if name in LISTS or name in ("tuple", "Tuple"):
        return [_list_of([ANYTHING], None)]
    if name in TABLES:
        return [_table_of([ANYTHING], [ANYTHING])]
    if name in NOT_TYPED:
        return []
    return [NAMES[name]] if name in NAMES else _alias(name, module)


def _last_name(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Name):
        return annotation.id
    return annotation.attr if isinstance(annotation, ast.Attribute) else ""


def _of_constant(annotation: ast.Constant, module: str) -> list[Kind]:
    """None, or an annotation in quotes."""
    if annotation.value is None:
        return [NULL]
    try:
        return wanted(ast.parse(str(annotation.value), mode="eval").body, module)
    except SyntaxError:
        return [CLASS]


def _of_subscript(annotation: ast.Subscript, module: str) -> list[Kind]:
    inside = annotation.slice
    items = inside.elts if isinstance(inside, ast.Tuple) else [inside]
    name = _last_name(annotation.value)
    if name == "Literal":
        return [_word(item.value) for item in items if isinstance(item, ast.Constant)]
    if name in ("Union", "Optional"):
        return _all_of([*items, *([ast.Constant(None)] if name == "Optional" else [])], module)
    if name in ("Annotated", "Final"):
        return wanted(items[0], module)
    if name in ("tuple", "Tuple"):
        is_long = isinstance(items[-1], ast.Constant) and items[-1].value is Ellipsis
        kinds = _all_of([item for item in items if not _is_ellipsis(item)], module)
        return [_list_of(kinds, None if is_long else len(items))]
    if name in LISTS:
        return [_list_of(wanted(items[0], module), None)]
    if name in TABLES and len(items) == 2:
        return [_table_of(wanted(items[0], module), wanted(items[1], module))]
    return [NAMES[name]] if name in NAMES else [CLASS]


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is Ellipsis


def _word(word: Any) -> Kind:
    """One value of a `Literal`; YAML takes `off` for false."""
    switches = {True: ("on", "yes"), False: ("off", "no")}

    def fits_word(value: Any) -> bool:
        if isinstance(value, bool) and not isinstance(word, bool):
            return word in switches[value]
        return bool(value == word)

    return Kind(repr(word), fits_word)


def _list_of(kinds: list[Kind], length: int | None) -> Kind:
    number = f"{length} " if length is not None else ""
    inside = " or ".join(kind.plural or kind.said for kind in kinds) or "values"

    def fits_list(value: Any) -> bool:
        if any(kind.may_be_class for kind in kinds) and not isinstance(value, list):
            return isinstance(value, dict | str)  # one class, to be appended or listed
        has_length = isinstance(value, list) and length in (None, len(value))
        return has_length and (not kinds or all(fits(item, kinds) for item in value))

    may_be_class = any(kind.may_be_class for kind in kinds)
    return Kind(f"a list of {number}{inside}", fits_list, "lists", may_be_class=may_be_class)


def _table_of(keys: list[Kind], values: list[Kind]) -> Kind:
    def fits_table(value: Any) -> bool:
        return isinstance(value, dict) and all(
            (not keys or fits(_as_key(key), keys)) and (not values or fits(item, values))
            for key, item in value.items()
        )

    inside = (" or ".join(kind.plural or kind.said for kind in kinds) for kinds in (keys, values))
    return Kind(f"a table {{{': '.join(inside)}}}", fits_table, "tables")


def _as_key(key: Any) -> Any:
    """A key of a table, which merging configs has made a text."""
    return yaml.safe_load(key) if isinstance(key, str) else key


def _alias(name: str, module: str) -> list[Kind]:
    if not module or not name:
        return [CLASS]
    try:
        home, value = find_alias(module, name)
    except (UnreadableError, RecursionError):
        return [CLASS]
    return [CLASS] if isinstance(value, ast.Name) else wanted(value, home)


def _all_of(annotations: Sequence[ast.expr], module: str) -> list[Kind]:
    found: dict[str, Kind] = {}
    for annotation in annotations:
        for kind in wanted(annotation, module):
            found.setdefault(kind.said, kind)
    return [*found.values()]


def fits(value: Any, kinds: Sequence[Kind]) -> bool:
    """Whether a value, as YAML reads it, is of one of the kinds that `wanted` returns."""
    return any(kind.fits(value) for kind in kinds)


def said(kinds: Sequence[Kind]) -> str:
    """The kinds in words."""
    return " or ".join(kind.said for kind in kinds)
