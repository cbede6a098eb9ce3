"""How the program was called, for sentences that say what to type next."""

import sys
from pathlib import Path


def command_line(called: str | None = None) -> str:
    """What a user types before the command.

    Args:
        called: First word of the command line; that of this process if None.

    >>> command_line("train.py"), command_line("/usr/bin/seglab")
    ('python train.py', 'seglab')
    """
    name = Path(sys.argv[0] if called is None else called).name
    if name == "train.py":
        return "python train.py"
    return "python -m seglab" if name == "__main__.py" else "seglab"


def program_name() -> str:
    """Name before each complaint: the last word of `command_line`."""
    return command_line().split()[-1]
