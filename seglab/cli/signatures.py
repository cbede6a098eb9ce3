"""What a class takes as arguments, read from its source."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from functools import cache

from seglab.cli.source_code import (
    Found,
    NoSuchNameError,
    UnreadableError,
    find_definition,
)


@dataclass(frozen=True)
class Parameter:
    """One argument of a class.

    Attributes:
        module: Where its annotation is written.
        annotation: None if there is none.
        default: As text; None if it must be given.
        help: From the docstring.
    """

    module: str
    annotation: ast.expr | None
    default: str | None
    help: str


@dataclass(frozen=True)
class Signature:
    """All arguments of a class.

    Attributes:
        name: Of the class, without its module.
        summary: First line of its docstring.
        parameters: By name.
        is_open: Whether there may be others that the source does not tell.
    """

    name: str
    summary: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    is_open: bool = False


@cache
def find_signature(path: str) -> Signature:
    """Read the arguments of a class or function.

    Raises:
        UnreadableError: Its source is not at hand.
        NoSuchNameError: There is a module, and no such name in it.

    >>> list(find_signature("seglab.reporting.predictions.PredictionWriter").parameters)
    ['folder', 'opacity']
    """
    return _signature(find_definition(path))


def _signature(found: Found) -> Signature:
    node = found.node
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    if isinstance(node, ast.FunctionDef):
        return Signature(node.name, summary, _parameters(found, node), node.args.kwarg is not None)
    own = next(
        (s for s in node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None
    )
    if own is None and _is_record(node):
        return Signature(node.name, summary, _fields(found, node))
    if own is None:
        bases = _of_bases(found, node)
        return Signature(node.name, summary, bases.parameters, bases.is_open)
    parameters = _parameters(found, own)
    parameters.pop("self", None)
    if own.args.kwarg is None:
        return Signature(node.name, summary, parameters)
    bases = _of_bases(found, node)
    if not _hands_on(own):  # they go elsewhere
        return Signature(node.name, summary, parameters, is_open=True)
    passed = _passed_on(own, list(bases.parameters))
    handed_on = {key: value for key, value in bases.parameters.items() if key not in passed}
    return Signature(node.name, summary, {**parameters, **handed_on}, bases.is_open)


def _of_bases(found: Found, node: ast.ClassDef) -> Signature:
    """Arguments of the first base that says what it takes."""
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in ("object", "ABC", "Protocol"):
            continue
        try:
            return _signature(find_definition(_absolute(found.module, base)))
        except (UnreadableError, NoSuchNameError):
            return Signature(node.name, "", is_open=True)
    return Signature(node.name, "")


def _absolute(module: str, expression: ast.expr) -> str:
    """Import path of a name as a module uses it; its subscript does not count."""
    if isinstance(expression, ast.Subscript):
        return _absolute(module, expression.value)
    if isinstance(expression, ast.Name):
        return f"{module}.{expression.id}"
    raise UnreadableError(module)  # an attribute of an imported module, a call


def _hands_on(init: ast.FunctionDef) -> bool:
    """Whether `super().__init__` is given the `**` arguments."""
    return any(keyword.arg is None for call in _super_calls(init) for keyword in call.keywords)


def _passed_on(init: ast.FunctionDef, names: list[str]) -> set[str]:
    """Arguments that `super().__init__` is given by name or place, so that nobody else may."""
    passed: set[str] = set()
    for call in _super_calls(init):
        passed |= {keyword.arg for keyword in call.keywords if keyword.arg is not None}
        passed |= set(names[: len(call.args)])
    return passed


def _super_calls(init: ast.FunctionDef) -> list[ast.Call]:
    calls = (node for node in ast.walk(init) if isinstance(node, ast.Call))
    return [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "__init__"]


def _is_record(node: ast.ClassDef) -> bool:
    """Whether the class is a dataclass or a named tuple."""
    words = [*node.decorator_list, *node.bases]
    return any("dataclass" in ast.dump(word) or "NamedTuple" in ast.dump(word) for word in words)


def _fields(found: Found, node: ast.ClassDef) -> dict[str, Parameter]:
    helps = _helps(node)
    return {
        s.target.id: Parameter(
            found.module,
            s.annotation,
            None if s.value is None else ast.unparse(s.value),
            helps.get(s.target.id, ""),
        )
        for s in node.body
        if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
    }


def _parameters(found: Found, function: ast.FunctionDef) -> dict[str, Parameter]:
    helps = {**_helps(found.node), **_helps(function)}
    arguments = [*function.args.posonlyargs, *function.args.args]
    without: list[ast.expr | None] = [None] * (len(arguments) - len(function.args.defaults))
    pairs = [
        *zip(arguments, [*without, *function.args.defaults], strict=True),
        *zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True),
    ]
    return {
        argument.arg: Parameter(
            found.module,
            argument.annotation,
            None if default is None else ast.unparse(default),
            helps.get(argument.arg, ""),
        )
        for argument, default in pairs
    }


def _helps(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """Texts below `Args:` or `Attributes:` of a docstring, by name."""
    text = ast.get_docstring(node) or ""
    section = re.search(r"^(?:Args|Attributes|Arguments):\n((?:[ \t]+.*\n?|\n)+)", text, re.M)
    if section is None:
        return {}
    item = r"^ {4}(\w+)(?: ?\([^)]*\))?: *(.*(?:\n {5,}.*|\n(?=\n? {5,}))*)"
    items = re.findall(item, section[1], re.M)
    return {name: " ".join(said.split()) for name, said in items}
