"""`models [PATTERN]`: what can be written into a config, and what a named one costs."""

from __future__ import annotations

import re
from collections import Counter
from textwrap import fill
from typing import TYPE_CHECKING

from seglab.cli.command_parser import CommandParser, read_size
from seglab.cli.program import command_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seglab.models.catalogue import Entry

N_COUNTED = 8  # so many are built and counted; of more, names only


def models(args: list[str]) -> None:
    """List what can be written into a config; of a few, parameters and multiply-adds too."""
    parser = CommandParser("models", models.__doc__)
    parser.add_argument("pattern", nargs="?", help="a name, a pattern such as 'swin*', or a part")
    parser.add_argument(
        "--size", type=read_size, default="512,512", help="height,width of the image; %(default)s"
    )
    parser.add_argument(
        "--encoder", default="resnet50", help="under heads and smp networks; %(default)s"
    )
    options = parser.parse_args(args)
    from seglab.models.catalogue import find_entries, list_entries

    entries = list_entries()
    if options.pattern is None:
        _print_kinds(entries)
        return
    found = find_entries(options.pattern, entries)
    if len(found) > N_COUNTED:
        _print_names(found)
    else:
        _print_costs(found, options.size, options.encoder)


def _print_kinds(entries: Sequence[Entry]) -> None:
    from seglab.models.catalogue import ENCODER

    for kind, count in Counter(entry.kind for entry in entries).items():
        names = [entry.name for entry in entries if entry.kind == kind]
        if kind == ENCODER:  # too many: families, by the beginning of the name
            families = Counter(re.split(r"[_\d]", name)[0] for name in names)
            names = [f"{family} ({n})" for family, n in sorted(families.items())]
        print(f"{kind}: {count}")
        print(_wrap(names))
    print(f"\n{command_line()} models 'swin*' lists names; a few, or one by its name, with costs")


def _wrap(names: Sequence[str]) -> str:
    text, indent = ", ".join(name.replace(" ", "\0") for name in names), "  "
    wrapped = fill(
        text, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return wrapped.replace("\0", " ")


def _print_names(entries: Sequence[Entry]) -> None:
    for kind in dict.fromkeys(entry.kind for entry in entries):
        names = [entry.name for entry in entries if entry.kind == kind]
        print(f"{kind}: {len(names)}")
        print(_wrap(names))
    print(f"\n{N_COUNTED} or fewer are shown with parameters and multiply-adds")


def _print_costs(entries: Sequence[Entry], size: tuple[int, int], encoder: str) -> None:
    from seglab.models.catalogue import HEAD, SMP_NETWORK, count_costs

    for entry in entries:
        print(f"{entry.name} ({entry.kind})")
        try:
            costs = count_costs(entry, size, encoder)
        except ValueError as error:
            print(f"  cannot be used: {' '.join(str(error).split())}")
            continue
        under = f" with {encoder} and 19 classes" if entry.kind in (HEAD, SMP_NETWORK) else ""
        print(
            f"  {costs.parameters / 1e6:.2f} M parameters, {costs.macs / 1e9:.2f} G multiply-adds "
            f"an image of {size[0]} x {size[1]}{under}"
        )
        if costs.channels:
            print(f"  channels {list(costs.channels)} at strides {list(costs.strides)}")
        print(f"  {entry.yaml}")
