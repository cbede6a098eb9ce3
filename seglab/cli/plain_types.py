"""Annotations of plain values: numbers, switches, words; everything else is not judged."""

from __future__ import annotations

import ast
from typing import Any

from seglab.cli.source_code import UnreadableError, find_alias

NAMES = {"int": "an integer", "float": "a number", "bool": "true or false", "None": "null"}


def wanted(annotation: ast.expr | None, module: str = "") -> list[str] | None:
    """What an annotation allows, in words; None if it allows other things than plain values.

    Args:
        annotation: Of an argument.
        module: Where it is written, for names that stand for others.

    >>> wanted(ast.parse("int | None", mode="eval").body)
    ['an integer', 'null']
    >>> wanted(ast.parse("Literal['fold', 'off']", mode="eval").body)
    ["'fold'", "'off'"]
    """
    if isinstance(annotation, ast.Constant) and annotation.value is None:
        return [NAMES["None"]]
    if isinstance(annotation, ast.Name):
        return [NAMES[annotation.id]] if annotation.id in NAMES else _alias(annotation.id, module)
    if isinstance(annotation, ast.BinOp):
        return _all_of([annotation.left, annotation.right], module)
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        inside = annotation.slice
        items = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        if annotation.value.id == "Literal":
            return [repr(i.value) for i in items if isinstance(i, ast.Constant)]
        if annotation.value.id == "Union":
            return _all_of(items, module)
        if annotation.value.id == "Optional":
            return _all_of([*items, ast.Constant(None)], module)
    return None


def _alias(name: str, module: str) -> list[str] | None:
    if not module or name == "str":
        return None
    try:
        home, value = find_alias(module, name)
    except (UnreadableError, RecursionError):
        return None
    return None if isinstance(value, ast.Name) else wanted(value, home)


def _all_of(annotations: list[ast.expr], module: str) -> list[str] | None:
    found: list[str] = []
    for annotation in annotations:
        kinds = wanted(annotation, module)
        if kinds is None:
            return None
        found += [kind for kind in kinds if kind not in found]
    return found


def fits(value: Any, kinds: list[str]) -> bool:
    """Whether a value, as YAML reads it, is of one of the kinds that `wanted` names."""
    if repr(value) in kinds or (isinstance(value, str) and value in kinds):
        return True
    if isinstance(value, bool):  # YAML takes `off` for false
        words = ("'on'", "'yes'") if value else ("'off'", "'no'")
        return NAMES["bool"] in kinds or any(word in kinds for word in words)
    if value is None or value in ("null", "None"):
        return NAMES["None"] in kinds
    if isinstance(value, int):
        return bool({NAMES["int"], NAMES["float"]} & set(kinds))
    if NAMES["float"] not in kinds or isinstance(value, list | dict):
        return False
    try:  # PyYAML takes 1e-3 for a word
        float(value)
    except ValueError:
        return False
    return True
