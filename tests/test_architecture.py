"""The house keeps its rules: which room may import which, without circles, and with plain names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CALLBACKS = ROOT / "callbacks" / "scale_equalization"
LEAVES = {"losses", "metrics", "optim", "palette", "visualize"}
SAYS_NOTHING = {"utils", "util", "common", "misc", "helpers"}
MAY_IMPORT_CALLBACKS = {"seglab.cli", "seglab.cli.commands"}


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    seglab = {name_of(path, ROOT): path for path in (ROOT / "seglab").rglob("*.py")}
    callback = {name_of(path, CALLBACKS.parent): path for path in CALLBACKS.rglob("*.py")}
    return {**seglab, **callback}


def imports(name: str, path: Path, at_import: bool = False) -> set[str]:
    """Modules of the project that a file imports; with `at_import`, only when it is imported."""
    known = modules()
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    nodes = list(_outside_functions(tree)) if at_import else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            deeper = {f"{base}.{alias.name}" for alias in node.names}
            found |= deeper & known.keys() or {base}
    return {module for module in found if module in known and module != name}


def _outside_functions(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _outside_functions(node)


def test_callbacks_do_not_know_the_workbench() -> None:
    for name, path in modules().items():
        if name.startswith("scale_equalization"):
            assert not {m for m in imports(name, path) if m.startswith("seglab")}, name


def test_only_the_door_knows_the_callbacks() -> None:
    guests = {
        name
        for name, path in modules().items()
        if name.startswith("seglab")
        and any(m.startswith("scale_equalization") for m in imports(name, path))
    }
    assert guests <= MAY_IMPORT_CALLBACKS


def test_only_the_hooks_import_lightning() -> None:
    guests = {
        path.name
        for path in CALLBACKS.glob("*.py")
        if any(
            "lightning" in (getattr(node, "module", "") or "")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        )
    }
    assert guests == {"calibration.py", "callback.py", "monitor.py"}


PRIVATE_PARTS = {"seglab.torch_internals", "seglab.lightning_internals"}
OF_JSONARGPARSE = {"self._get", "self._parser", "self._subcommand_parsers", "self._find_root"}
"""Methods of LightningCLI and of our own base classes, which subclasses are meant to use."""


def private_uses(path: Path) -> set[str]:
    """Attributes with a leading underscore that the file itself does not define."""
    tree = ast.parse(path.read_text())
    own = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    own |= {a.attr for a in attributes if isinstance(a.ctx, ast.Store)}
    own |= {n.target.id for n in ast.walk(tree) if isinstance(n, ast.AnnAssign)
            and isinstance(n.target, ast.Name)}  # fmt: skip
    return {
        ast.unparse(a)
        for a in attributes
        if a.attr.startswith("_") and not a.attr.startswith("__") and a.attr not in own
    }


def test_private_parts_of_frameworks_are_gathered() -> None:
    found = {
        f"{name}: {use}"
        for name, path in modules().items()
        if name.startswith("seglab") and name not in PRIVATE_PARTS
        for use in private_uses(path) - OF_JSONARGPARSE
    }
    assert found <= {
        "seglab.cli.study_run: os._exit",  # public in spite of its name
        "seglab.data.ade20k: self._files",
        "seglab.data.cityscapes: self._files",
        "seglab.data.voc: self._files",
        "seglab.whole_steps: Course.of(trainer)._asdict",  # public, of a namedtuple
    }


def test_task_knows_no_model_and_no_data_by_name() -> None:
    path = ROOT / "seglab" / "task.py"
    allowed = {"seglab.models.segmenter", "seglab.models"}
    found = imports("seglab.task", path)
    assert not {m for m in found if m.startswith(("seglab.models", "seglab.data"))} - allowed


def test_leaves_import_no_room() -> None:
    rooms = ("seglab.models", "seglab.data", "seglab.task", "seglab.cli", "seglab.cli.experiment")
    for leaf in LEAVES:
        found = imports(f"seglab.{leaf}", ROOT / "seglab" / f"{leaf}.py")
        assert not {m for m in found if m.startswith(rooms)}, leaf


def test_imports_make_no_circle() -> None:
    graph = {name: imports(name, path, at_import=True) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            pytest.fail(" -> ".join([*trail[trail.index(name) :], name]))
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [path for path in ROOT.rglob("*.py") if path.stem in SAYS_NOTHING and _ours(path)]


def test_no_file_is_longer_than_350_lines() -> None:
    long = {
        str(path.relative_to(ROOT)): path.read_text().count("\n")
        for path in [*modules().values(), ROOT / "train.py"]
    }
    assert {path: n for path, n in long.items() if n > 350} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    long = [
        f"{name}.{node.name}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _body_lines(node) > 60
    ]
    assert long == []


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1


def _ours(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(ROOT).parts)


def test_readme_tree_names_every_room_of_the_house() -> None:
    rooms = {f"{path.parent.relative_to(ROOT)}/" for path in modules().values()}
    readme = (ROOT / "README.md").read_text()
    listed = {line.split()[0] for line in readme.splitlines() if "/ " in line and line[0].islower()}
    assert rooms <= listed
