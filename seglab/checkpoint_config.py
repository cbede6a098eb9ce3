"""`validate`, `test` and `predict` from a checkpoint alone: its own config stands in."""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import yaml

from seglab.checkpoints import read_checkpoint


def add_checkpoint_config(args: list[str]) -> list[str]:
    """Put the checkpoint's `model` and `data` sections before the arguments, where these have none.

    A section that a config file brings is left to it; single values on the command line override.

    Args:
        args: Of an evaluating command; without `--ckpt_path` they are returned as they are.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It holds no config, and none was given.
    """
    options = _options(args)
    if options.ckpt_path is None:
        return args
    given = _sections(options.config)
    missing = [key for key in ("model", "data") if key not in given]
    if not missing:
        return args
    kept = read_checkpoint(options.ckpt_path).get("config")
    if kept is None:
        raise ValueError(
            f"checkpoint {options.ckpt_path} holds no config: give the {' and '.join(missing)}"
            " section with --config."
        )
    return [f"--{key}={json.dumps(kept[key])}" for key in missing] + args


def _options(args: list[str]) -> Any:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("-c", "--config", action="append", default=[])
    return parser.parse_known_args(args)[0]


def _sections(configs: list[str]) -> set[str]:
    contents = [yaml.safe_load(Path(path).read_text()) for path in configs]
    return {key for content in contents if isinstance(content, dict) for key in content}
