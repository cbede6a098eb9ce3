"""Parser of a command's own options, whose complaints are one sentence."""

from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError
from difflib import get_close_matches
from typing import NoReturn

from seglab.cli.arguments import ConfigError
from seglab.cli.program import command_line, program_name


class CommandParser(ArgumentParser):
    """Takes options by their whole names only.

    Args:
        command: Such as "init" or "prepare coco".
        description: What it does.
        usage: Its first line of help; made of the options if None.
    """

    def __init__(
        self, command: str, description: str | None = None, usage: str | None = None
    ) -> None:
        super().__init__(
            prog=f"{program_name()} {command}",
            description=description,
            usage=usage,
            allow_abbrev=False,
        )
        self.command = command

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed.

        Raises:
            ConfigError: With the option that was probably meant.
        """
        options = sorted({*re.findall(r"--\w+", self.format_help())})
        found = re.match(r"unrecognized arguments: (--\w+)", message)
        near = get_close_matches(found[1], options, n=1) if found else []
        hint = f"did you mean {near[0]}?" if near else ""
        more = f"`{command_line()} {self.command} --help` shows what it takes."
        raise ConfigError(f"{self.command}: {message}; {hint or more}")


def read_size(text: str) -> tuple[int, int]:
    """Read HEIGHT,WIDTH of a command line."""
    try:
        height, width = (int(side) for side in text.replace("x", ",").split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not HEIGHT,WIDTH, such as 512,512") from None
    if min(height, width) < 1:
        raise ArgumentTypeError(f"{text!r}: both must be at least 1")
    return height, width
