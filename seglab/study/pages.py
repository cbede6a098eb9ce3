"""Write study.md and study.html: verdicts, tables and pictures of a study."""

from __future__ import annotations

import html
from collections.abc import Sequence

from seglab.study.findings import Analysis
from seglab.study.pictures import Picture, pictures
from seglab.study.tables import NAMES, Table, comparison_name, tables

NO_PICTURES = "Pictures are left out, since matplotlib is missing: pip install matplotlib."
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --line: #d0d7de; --mark: #eef4fb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --mark: #16263a } }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem }
.verdict { border-left: 4px solid #0a7cc4; background: var(--mark); padding: .6rem 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right;
  white-space: nowrap }
th { vertical-align: bottom } .word { text-align: left }
.sentence { text-align: left; white-space: normal; min-width: 18rem }
.marked { background: var(--mark); font-weight: 600 }
figure { margin: 1.5rem 0 } figcaption { font-weight: 600 }
svg { height: auto; max-width: 100%; min-width: 28rem }
@media (max-width: 45rem) {
  .stacked tr { display: block; border-bottom: 1px solid var(--line); padding: .3rem .6rem }
  .stacked td { display: inline; border: 0; padding: 0 .6rem 0 0; white-space: normal }
  .stacked td.sentence { display: block } .stacked th { display: none } }
"""


def write_pages(found: Analysis) -> None:
    """Write the pages, and the pictures as files beside them."""
    folder = found.study.folder
    remarks = list(found.study.remarks)
    try:
        drawn = pictures(found)
    except ImportError:
        drawn = []
        remarks.append(NO_PICTURES)
    (folder / "pictures").mkdir(exist_ok=True)
    for picture in drawn:
        path = folder / "pictures" / f"{picture.name}.svg"
        path.write_text(picture.svg, encoding="utf-8")
    made = list(tables(found))
    (folder / "study.md").write_text(markdown(found, made, drawn, remarks), encoding="utf-8")
    (folder / "study.html").write_text(page(found, made, drawn, remarks), encoding="utf-8")


def headline(found: Analysis) -> str:
    """The primary comparison in one sentence."""
    n_missing, name = len(found.study.missing), comparison_name(found.primary)
    early = f"Preliminary (runs missing: {n_missing}). " if n_missing else ""
    return f"{early}{name}, {NAMES[found.study.metric]}: {found.primary.verdict}."


def console(found: Analysis) -> str:
    """What the command prints."""
    lines = [headline(found), *found.study.remarks]
    return "\n".join([*lines, f"{found.study.folder / 'study.html'}"])


def markdown(
    found: Analysis, made: Sequence[Table], drawn: Sequence[Picture], remarks: Sequence[str]
) -> str:
    """The page as Markdown."""
    parts = [f"# Study {found.study.folder.resolve().name}", f"**{_cell(headline(found))}**"]
    parts += ["\n".join(f"- {_cell(remark)}" for remark in remarks)] if remarks else []
    parts += [f"![{picture.title}](pictures/{picture.name}.svg)" for picture in drawn]
    for table in made:
        parts += [f"## {table.title}", *([table.note] if table.note else []), _markdown(table)]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    rule = ["---" if i < table.n_words else "--:" for i in range(len(table.header))]
    rows = [
        [f"**{_cell(cell)}**" if i in table.marked and cell else _cell(cell) for cell in row]
        for i, row in enumerate(table.rows)
    ]
    lines = [[_cell(name) for name in table.header], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    for mark in "\\|*_<`[":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def page(
    found: Analysis, made: Sequence[Table], drawn: Sequence[Picture], remarks: Sequence[str]
) -> str:
    """The page as one HTML file that needs no other."""
    title = html.escape(f"Study {found.study.folder.resolve().name}")
    verdicts, *others = made
    body = [
        f"<h1>{title}</h1>",
        f'<p class="verdict">{html.escape(headline(found))}</p>',
        *(["<ul>", *(f"<li>{html.escape(r)}</li>" for r in remarks), "</ul>"] if remarks else []),
        _html(verdicts),
        *(_figure(picture) for picture in drawn),
        *(_html(table) for table in others),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _figure(picture: Picture) -> str:
    caption = html.escape(picture.title)
    return (
        f'<figure><figcaption>{caption}</figcaption><div class="wide">{picture.inline}</div>'
        "</figure>"
    )


def _html(table: Table) -> str:
    words = ["sentence" if _is_long(table, i) else "word" for i in range(table.n_words)]
    kinds = [*words, *[""] * (len(table.header) - table.n_words)]
    lines = [_line("th", table.header, kinds)]
    for index, row in enumerate(table.rows):
        lines.append(_line("td", row, kinds, "marked" if index in table.marked else ""))
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    rows = "\n".join(lines)
    kind = _class("stacked" if "sentence" in kinds else "")
    return f'<h2>{table.title}</h2>{note}<div class="wide"><table{kind}>\n{rows}\n</table></div>'


def _is_long(table: Table, column: int) -> bool:
    return any(len(row[column]) > 40 for row in table.rows)


def _line(tag: str, cells: Sequence[str], kinds: Sequence[str], kind: str = "") -> str:
    inside = "".join(
        f"<{tag}{_class(k)}>{html.escape(cell)}</{tag}>"
        for cell, k in zip(cells, kinds, strict=True)
    )
    return f"<tr{_class(kind)}>{inside}</tr>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
