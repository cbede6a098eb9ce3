"""Build sentences of messages and cells of tables."""

from collections.abc import Sequence


def listed(things: Sequence[object], n_shown: int = 3) -> str:
    """Name the first few and count the rest.

    >>> listed(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    shown = ", ".join(str(thing) for thing in things[:n_shown])
    return shown + (f" and {len(things) - n_shown} more" if len(things) > n_shown else "")


def table_cell(text: str) -> str:
    r"""A name that does not end a cell of a Markdown table.

    >>> table_cell("bus|tram")
    'bus\\|tram'
    """
    return text.replace("|", "\\|")
