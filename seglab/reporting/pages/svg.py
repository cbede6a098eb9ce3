"""Charts as SVG inside a page: in its colours and font, with ids of their own and a description."""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET  # reads what matplotlib wrote, nothing else

from seglab.reporting.charts import INK, LINE, MUTED, PAPER, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES)
}
_COLOR = re.compile("|".join(_VARIABLES), re.IGNORECASE)
_ID = re.compile(r"url\(#([^)]+)\)")


def to_svg(figure: Figure, ident: str, title: str, description: str = "") -> str:
    """Draw a figure as an SVG element that needs nothing from outside.

    Args:
        figure: Of `seglab.reporting.charts`.
        ident: Unique in the page; begins every id inside.
        title: Read out in place of the picture.
        description: Read out after it.
    """
    import matplotlib

    file = io.StringIO()
    # Text stays text; what ids are made of does not change from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "seglab"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())  # noqa: S314
    _strip(root)
    _rename(root, ident)
    box = root.get("viewBox", "0 0 1 1")
    body = "".join(ET.tostring(child, "unicode") for child in root)
    return (
        f'<svg viewBox="{box}" role="img" aria-labelledby="{ident}-title {ident}-desc">'
        f'<title id="{ident}-title">{escape(title)}</title>'
        f'<desc id="{ident}-desc">{escape(description)}</desc>{body}</svg>'
    )


def _strip(element: ET.Element) -> None:
    """Take out namespaces, metadata and rules that would hold for the whole page."""
    for child in list(element):
        child.tag = child.tag.rpartition("}")[2]
        if child.tag in ("metadata", "style"):
            element.remove(child)
        else:
            _strip(child)


def _rename(root: ET.Element, ident: str) -> None:
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            name = key.rpartition("}")[2]
            if name == "id":
                value = f"{ident}-{value}"
            elif name == "href" and value.startswith("#"):
                value = f"#{ident}-{value[1:]}"
            elif name == "style":
                value = _themed(value)
            element.set(name, _ID.sub(rf"url(#{ident}-\1)", value))


def _themed(style: str) -> str:
    style = _COLOR.sub(lambda found: f"var({_VARIABLES[found[0].lower()]})", style)
    # `font: 9px 'DejaVu Sans', ...` would bring matplotlib's font along.
    return re.sub(r"font: (?:[\w ]*? )?([\d.]+)px [^;]*", r"font-size: \1px", style)
