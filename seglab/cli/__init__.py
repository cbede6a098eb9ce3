"""The door: `python train.py COMMAND ...`.

Commands are found in one table. Each is a function that takes the remaining arguments and imports
what it needs when it is called, so that `--help` and `--version` answer before torch is loaded. A
command that needs a whole experiment without running it asks `build_experiment(args)`, which
takes the same arguments and configs as `fit`.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from seglab import __version__
from seglab.cli import commands
from seglab.cli.user_errors import BAD_USAGE, one_sentence

if TYPE_CHECKING:
    from seglab.cli.experiment import Experiment


class Command(NamedTuple):
    """One line of the table: what it does, and what does it."""

    help: str
    run: Callable[[list[str]], object]


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: Command and its arguments; those of the process if None.

    Raises:
        SystemExit: With a sentence on stderr, for anything the user can mend.

    >>> main(["--version"])
    seglab 0.2.0
    """
    args = list(sys.argv[1:] if args is None else args)
    show_traceback = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"seglab {__version__}")
    else:
        with one_sentence(show_traceback):
            find_command(name).run(rest)


def usage() -> str:
    """What `--help` prints."""
    lines = [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python train.py COMMAND --config FILE [--SECTION.KEY VALUE ...]",
            "",
            *lines,
            "",
            "sections: trainer, data, model, scale_equalization, speed, predictions,"
            " seed_everything",
            "python train.py COMMAND --help lists every key; --print_config shows what it is set"
            " to.",
            "--traceback shows where an error came from.",
        ]
    )


def find_command(name: str) -> Command:
    """Look a command up.

    Raises:
        SystemExit: There is none of that name.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}."
    print(f"train.py: no command {name!r}; {hint}", file=sys.stderr)
    raise SystemExit(BAD_USAGE)


def build_experiment(args: list[str]) -> "Experiment":
    """Build model, data and trainer from the arguments that `fit` takes, and run nothing."""
    return _experiment("fit", args, run=False)


def _experiment(command: str, args: list[str], run: bool = True) -> "Experiment":
    # Lightning calls three functions that jsonargparse will drop in version 5, which we exclude.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    # Idle OpenMP threads sleep instead of spinning: with the two cores of a small machine busy
    # elsewhere (a loader, another run), a training step took 0.3 s in place of 0.6 to 3.8 s.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _fast_imports():
        from scale_equalization import ScaleEqualizationCallback

        from seglab.cli.config_files import add_checkpoint_config, check_configs
        from seglab.cli.experiment import Experiment
        from seglab.cli.quiet import silence_noise
        from seglab.reporting.predictions import PredictionWriter
        from seglab.training_speed import TrainingSpeed
    silence_noise(command)
    check_configs(args)
    if command != "fit":
        args = add_checkpoint_config(args)
    sections = {
        "scale_equalization": ScaleEqualizationCallback,
        "speed": TrainingSpeed,
        "predictions": PredictionWriter,
    }
    return Experiment(command, args, sections, run)


def _equalize(args: list[str]) -> None:
    commands.equalize(args, build_experiment)


def _export(args: list[str]) -> None:
    from seglab.cli.export import export

    export(args)


def _summary(args: list[str]) -> None:
    from scale_equalization import find_fusions

    commands.summary(args, build_experiment, find_fusions)


def _models(args: list[str]) -> None:
    with _fast_imports():
        from seglab.cli.models import models
    models(args)


@contextmanager
def _fast_imports() -> Iterator[None]:
    """Importing torch and lightning makes no garbage: looking for it takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


COMMANDS = {
    "fit": Command("train, validating as it goes", partial(_experiment, "fit")),
    "validate": Command("evaluate on the validation split", partial(_experiment, "validate")),
    "test": Command("evaluate on the test split", partial(_experiment, "test")),
    "predict": Command("write masks and overlays for a folder", partial(_experiment, "predict")),
    "export": Command("write a checkpoint as onnx, torch_export or safetensors", _export),
    "equalize": Command("write an equalized initial checkpoint", _equalize),
    "summary": Command("parameters, multiply-adds, memory and fusions of a network", _summary),
    "models": Command("list encoders, heads and networks, and what they cost", _models),
    "init": Command("write a config for a folder of images and masks", commands.init),
    "prepare": Command("fetch a data set; coco, labelme: polygons to masks", commands.prepare),
    "doctor": Command("examine every file of a data set", commands.doctor),
    "browse": Command("write a contact sheet of training samples", commands.browse),
}
