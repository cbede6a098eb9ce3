"""The templates of pages and cards, which lie beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def templates() -> Any:
    """The templates beside this file; what is filled into HTML is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
