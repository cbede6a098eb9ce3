"""Read a web page as a browser would, strictly: nesting, ids, references, words for pictures."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

VOID = {"br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
NOT_IN_P = {"div", "p", "table", "ul", "ol", "dl", "figure", "section", "details", "pre", "h2"}
LINKS = ("src", "href", "action", "data", "poster", "srcset")


class Page(HTMLParser):
    """Tags, ids and faults of a page.

    Attributes:
        faults: Sentences on what is not valid.
        external: Addresses that a browser would fetch or that lead out of the page.
        text: By tag name, the text directly inside, in order.
    """

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.faults: list[str] = []
        self.external: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look_at(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID and "svg" not in self._open:
            self.faults.append(f"<{tag}/> is closed by itself")
        self._look_at(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()} closes something else")

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open[-3:]) and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()
        if self._open and self._open[-1] == "style":
            self.external += re.findall(r"@import[^;]*|url\((?!['\"]?(?:data:|#))[^)]*\)", data)

    def _look_at(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        values = dict(attrs)
        self.tags[tag] += 1
        if len(names) != len(set(names)):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag in NOT_IN_P and "p" in self._open:
            self.faults.append(f"<{tag}> in <p> at {self.getpos()}")
        if tag == "img" and "alt" not in values:
            self.faults.append(f"<img> without alt at {self.getpos()}")
        if tag == "svg" and not (values.get("role") == "img" and values.get("aria-labelledby")):
            self.faults.append("<svg> without a name")
        if values.get("id") is not None:
            self.ids[str(values["id"])] += 1
        for name in LINKS:
            self._follow(values.get(name))
        self._references += (values.get("aria-labelledby") or "").split()
        self._references += re.findall(
            r"url\(#([^)]+)\)", " ".join(v or "" for v in values.values())
        )

    def _follow(self, address: str | None) -> None:
        if address is None or address.startswith("data:"):
            return
        if address.startswith("#"):
            self._references.append(address[1:])
        else:
            self.external.append(address)

    def finish(self) -> Page:
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self._open]
        self.faults += [f"id {ident} {n} times" for ident, n in self.ids.items() if n > 1]
        self.faults += [f"#{ref} leads nowhere" for ref in self._references if ref not in self.ids]
        return self

    def count(self, tag: str) -> int:
        return self.tags[tag]


def parse(text: str) -> Page:
    """Read a page."""
    page = Page()
    page.feed(text)
    return page.finish()
