"""Find classes by import path in source files, without importing anything.

Importing torch and lightning takes seconds, reading a signature from a file milliseconds: mistakes
in arguments can be told at once. What cannot be read this way is left to the real parser.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

Definition = ast.ClassDef | ast.FunctionDef


class Found(NamedTuple):
    """A class or function, and the module that it is written in."""

    module: str
    node: Definition


class UnreadableError(Exception):
    """The source does not tell; the real import may."""


class NoSuchModuleError(UnreadableError):
    """A module is nowhere among the packages that are installed.

    Args:
        module: That was looked for.
        names: Modules that are where it should be, with their full names.
    """

    def __init__(self, module: str, names: list[str]) -> None:
        super().__init__(f"there is no module {module}")
        self.module, self.names = module, names


class NoSuchNameError(Exception):
    """A module can be read and does not have a name.

    Args:
        module: That was looked into.
        name: That is not there.
        names: That are.
    """

    def __init__(self, module: str, name: str, names: list[str]) -> None:
        super().__init__(f"{module} has no {name}")
        self.module, self.name, self.names = module, name, names


def find_definition(path: str) -> Found:
    """Look an import path up.

    Args:
        path: Such as `torch.optim.SGD`.

    Raises:
        UnreadableError: Its source is not at hand.
        NoSuchNameError: The module is, and has no such name.

    >>> find_definition("seglab.palette.make_palette").node.name
    'make_palette'
    """
    module, _, name = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        raise UnreadableError(path)
    return _look_up(module, name, ())


def find_alias(module: str, name: str) -> tuple[str, ast.expr]:
    """What a name such as `Mode = Literal["a", "b"]` stands for, and the module that says so.

    Raises:
        UnreadableError: It is no such name.
    """
    for node in _statements(module):
        if isinstance(node, ast.Assign) and name in _targets(node):
            return module, node.value
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_alias(_origin(module, node), alias.name)
    raise UnreadableError(f"{module}.{name}")


def _look_up(module: str, name: str, trail: tuple[tuple[str, str], ...]) -> Found:
    if (module, name) in trail:
        raise UnreadableError(module)
    trail = (*trail, (module, name))
    for node in _statements(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Found(module, node)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _look_up(_origin(module, node), alias.name, trail)
        if isinstance(node, ast.Assign) and name in _targets(node):
            if isinstance(node.value, ast.Name):
                return _look_up(module, node.value.id, trail)
            raise UnreadableError(f"{module}.{name}")  # made by a call
    return _look_behind(module, name, trail)


def _look_behind(module: str, name: str, trail: tuple[tuple[str, str], ...]) -> Found:
    """A name that no statement binds: from `import *`, or made when the module runs."""
    names = list(_bound_names(module))
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            try:
                return _look_up(_origin(module, node), name, trail)
            except NoSuchNameError as error:
                names += error.names
    public = _public_names(module)
    if name in (public or names) or ("__getattr__" in names and not public):
        raise UnreadableError(f"{module}.{name}")
    raise NoSuchNameError(module, name, [n for n in public or names if not n.startswith("_")])


def _public_names(module: str) -> list[str]:
    """What `__all__` lists, if it is a plain list."""
    for node in _statements(module):
        if isinstance(node, ast.Assign) and "__all__" in _targets(node):
            elements = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else []
            return [str(e.value) for e in elements if isinstance(e, ast.Constant)]
    return []


def _targets(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _bound_names(module: str) -> Iterator[str]:
    for node in _statements(module):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.For | ast.With):
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name))


def _statements(module: str) -> list[ast.stmt]:
    return _parsed(_file(module))


@cache
def _parsed(file: Path) -> list[ast.stmt]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UnreadableError(str(file)) from error
    return list(_unconditional(tree.body))


def _unconditional(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, those below `if` and `try` included."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _unconditional([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handlers = [s for handler in node.handlers for s in handler.body]
            yield from _unconditional([*node.body, *node.orelse, *handlers])
        else:
            yield node


@cache
def _file(module: str) -> Path:
    """Source of a module; only the packages' folders are looked at."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError) as error:
        raise UnreadableError(module) from error
    if spec is None:
        raise NoSuchModuleError(module, [])
    if not rest and spec.origin is not None and spec.origin.endswith(".py"):
        return Path(spec.origin)
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    for folder in folders:
        base = folder.joinpath(*rest)
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                return file
    if not rest or any([*folder.joinpath(*rest[:-1]).glob(f"{rest[-1]}*")] for folder in folders):
        raise UnreadableError(module)  # compiled, or a folder without a file of its own
    raise NoSuchModuleError(module, _siblings(top, folders, rest))


def _siblings(top: str, folders: list[Path], rest: list[str]) -> list[str]:
    """Modules of the innermost package that is there, on the way to one that is not."""
    depth = 0
    while any(folder.joinpath(*rest[: depth + 1]).is_dir() for folder in folders):
        depth += 1
    homes = [folder.joinpath(*rest[:depth]) for folder in folders]
    names = {path.stem for home in homes if home.is_dir() for path in home.iterdir()}
    return [".".join([top, *rest[:depth], name]) for name in sorted(names) if name[0] != "_"]


def _origin(module: str, node: ast.ImportFrom) -> str:
    """Absolute name of the module that a statement imports from."""
    if not node.level:
        return node.module or ""
    is_package = _file(module).name == "__init__.py"
    parents = module.split(".")
    kept = len(parents) - node.level + is_package
    return ".".join([*parents[:kept], *([node.module] if node.module else [])])
