"""The configs named on a command line, looked at before the parser does.

Two things are wanted that the parser does not give: an unreadable file is named in the complaint,
and `validate`, `test` and `predict` take from the checkpoint what no config brings.
"""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from seglab.checkpoints import read_checkpoint
from seglab.cli.arguments import read_config


def check_configs(args: list[str]) -> list[str]:
    """Read every `--config` once.

    Args:
        args: Of a command.

    Returns:
        The sections that they bring, each once.

    Raises:
        FileNotFoundError: A config does not exist.
        ConfigError: A config is no YAML, or not sections with values.
    """
    return list({key: None for path in _options(args).config for key in read_config(Path(path))})


def add_checkpoint_config(args: list[str]) -> list[str]:
    """Put the checkpoint's `model` and `data` before the arguments, where no config brings them.

    Single values on the command line override both.

    Args:
        args: Of an evaluating command; without `--ckpt_path` they are returned as they are.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It holds no config, and none was given.
    """
    checkpoint = _options(args).ckpt_path
    missing = [key for key in ("model", "data") if key not in check_configs(args)]
    if checkpoint is None or not missing:
        return args
    kept = read_checkpoint(checkpoint).get("config")
    if kept is None:
        raise ValueError(
            f"checkpoint {checkpoint} holds no config: give the {' and '.join(missing)}"
            " section with --config."
        )
    return [f"--{key}={json.dumps(kept[key])}" for key in missing] + args


def _options(args: list[str]) -> Any:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("-c", "--config", action="append", default=[])
    return parser.parse_known_args(args)[0]
