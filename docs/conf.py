"""Configuration of the documentation site: `make docs` builds docs/_build/index.html."""

import ast
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "callbacks")]
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
warnings.simplefilter("ignore")  # of the libraries that autodoc imports; Sphinx's own are errors

project = "seglab"
author = "The seglab authors"
html_title = "seglab"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
suppress_warnings = ["myst.header"]  # pages quote callbacks/README.md, which starts at level 2


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.partition("\n")[0].rstrip(".")


def house() -> str:
    """Return the tree of all modules, one line each, from their own first lines."""
    lines = []
    for top in ("callbacks/scale_equalization", "seglab", "benchmarks"):
        folders = sorted({path.parent for path in (ROOT / top).rglob("*.py")})
        for folder in folders:
            own = folder / "__init__.py"
            about = (
                first_line(own)
                if own.exists()
                else "What prints the tables of these pages, and its helpers"
            )
            lines.append(f"{folder.relative_to(ROOT)}/".ljust(34) + about)
            lines += [
                f"    {path.name}".ljust(34) + first_line(path)
                for path in sorted(folder.glob("*.py"))
                if path != own
            ]
    return "\n".join(lines)


def _insert_house(_app: object, _docname: str, source: list[str]) -> None:
    source[0] = source[0].replace("@HOUSE@", house())


def setup(app: object) -> None:
    """Fill the tree into the architecture page when it is read."""
    app.connect("source-read", _insert_house)  # type: ignore[attr-defined]
