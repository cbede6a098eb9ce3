"""The door: `python train.py COMMAND ...`.

Commands are found in one table. Each is a function that takes the remaining arguments and imports
what it needs when it is called, so that `--help` and `--version` answer before torch is loaded. A
command that needs a whole experiment without running it asks `build_experiment(args)`, which
takes the same arguments and configs as `fit`.
"""

import gc
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, NamedTuple

from seglab import __version__
from seglab.cli import commands
from seglab.cli.arguments import ConfigError, collect
from seglab.cli.check import SECTIONS, check_arguments
from seglab.cli.help import help_text
from seglab.cli.program import command_line, program_name
from seglab.cli.run_folder import require_run
from seglab.cli.shipped_configs import with_paths
from seglab.cli.user_errors import BAD_USAGE, StoppedError, one_sentence
from seglab.cli.values import check_root

if TYPE_CHECKING:
    from seglab.cli.experiment import Experiment
    from seglab.cli.resume import Continued


class Command(NamedTuple):
    """One line of the table.

    Attributes:
        help: What it does.
        run: What does it.
        takes_config: Whether its arguments are those of a config.
        needs: Sections without which it cannot begin.
        reads_data: Whether the folder that `data` names must be there.
    """

    help: str
    run: Callable[[list[str]], object]
    takes_config: bool = True
    needs: tuple[str, ...] = ()
    reads_data: bool = False


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
            run_command(name, rest)


def run_command(name: str, args: list[str]) -> None:
    """Find a command, look its arguments over and run it.

    What can be told without torch is told before it is loaded.
    """
    command = find_command(name)
    args = with_paths(args)
    help_words = [arg for arg in args if arg in ("-h", "--help", "--help=all")]
    labels_files = name == "predict" and any(arg.partition("=")[0] == "--input" for arg in args)
    if help_words and name in TRAINER_COMMANDS and not labels_files:
        given = collect([arg for arg in args if arg not in help_words])
        print(help_text(name, command.help, given, "--help=all" in help_words))
        return
    if labels_files:
        from seglab.cli.predict import predict_files

        predict_files(help_words or args)
        return
    stray = {arg.partition("=")[0] for arg in args} & {*OF_FILES} if name == "predict" else ()
    if stray:
        raise ConfigError(f"predict: {min(stray)} needs images that are named: give --input FILES.")
    draws_polygons = name == "prepare" and args[:1] and not args[0].startswith("-")
    if command.takes_config and not help_words and not draws_polygons:
        own = [arg for arg in args if not arg.startswith("--print_config")]
        starts_alone = any(arg.startswith(("--ckpt_path", "--resume")) for arg in own)
        is_whole = name in TRAINER_COMMANDS
        given = check_arguments(own, is_whole, () if starts_alone else command.needs)
        for line in given.overridden if _speaks() else ():
            print(f"note: {line}", file=sys.stderr)
        if given.tree.get("resume") is not None:
            require_run(Path(str(given.tree["resume"])))
        elif command.reads_data:
            check_root(given.tree.get("data"))
    command.run(args)


def _speaks() -> bool:
    """Whether this process is the first of its run, as launchers tell before torch is loaded."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return all(rank == "0" for rank in ranks)


def usage() -> str:
    """What `--help` prints."""
    lines = [f"  {name:<10} {command.help}" for name, command in COMMANDS.items()]
    program = command_line()
    return "\n".join(
        [
            f"usage: {program} COMMAND --config NAME [--SECTION.KEY VALUE ...]",
            "",
            *lines,
            "",
            "NAME is a file or a shipped config: quickstart, ade20k/upernet_swin_t, ...",
            f"sections: {', '.join(SECTIONS)}",
            f"{program} COMMAND --config NAME --help shows the keys, --print_config their values,",
            "--traceback where an error came from.",
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
    print(f"{program_name()}: no command {name!r}; {hint}", file=sys.stderr)
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
        from seglab.lightning_internals import is_first_process
        from seglab.reporting.predictions import PredictionWriter
        from seglab.stopping import RunStoppedError
        from seglab.training_speed import TrainingSpeed
    silence_noise(command)
    continued, args = _continued(command, args)
    check_configs(args)
    if command != "fit":
        args = add_checkpoint_config(args)
    sections = {
        "scale_equalization": ScaleEqualizationCallback,
        "speed": TrainingSpeed,
        "predictions": PredictionWriter,
    }
    try:
        return Experiment(command, args, sections, run, continued)
    except RunStoppedError as stop:
        if not is_first_process():  # one process speaks; an error code would have the others killed
            raise SystemExit(0) from None
        raise StoppedError(f"{stop}{_how_to_go_on(stop.checkpoint)}", stop.signum) from None


def _continued(command: str, args: list[str]) -> "tuple[Continued | None, list[str]]":
    """The run that `--resume` names, and the arguments that continue it."""
    from seglab.cli.resume import find_run, resumed_args
    from seglab.lightning_internals import is_first_process

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    options, rest = parser.parse_known_args(args)
    if options.resume is None or command != "fit":
        return None, args
    run = find_run(options.resume)
    if is_first_process():
        print(f"continuing {run.folder} after step {run.step}")
    return run, resumed_args(rest, run)


def _how_to_go_on(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return ""
    folder = checkpoint.parent.parent
    if checkpoint.parent.name == "checkpoints" and (folder / "config.yaml").is_file():
        return f"; continue with: {command_line()} fit --resume {quote(str(folder))}"
    return f"; continue with the same command and --ckpt_path {quote(str(checkpoint))}"


def _equalize(args: list[str]) -> None:
    commands.equalize(args, build_experiment)


def _export(args: list[str]) -> None:
    from seglab.cli.export import export

    export(args)


def _report(args: list[str]) -> None:
    with _fast_imports():
        from seglab.cli.report import report
    report(args)


def _study(args: list[str]) -> None:
    from seglab.cli.study import study

    study(args, build_experiment)


def _summary(args: list[str]) -> None:
    def find_fusions(*args: Any) -> Any:
        from scale_equalization import find_fusions

        return find_fusions(*args)

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


TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

OF_FILES = (
    *("--output", "--optimize", "--backend", "--overlays", "--submission", "--window"),
    *("--batch_size", "--device", "--precision"),
)
"""Options that `predict` has with `--input` only."""

DATA, ALL = ("data",), ("data", "model")

COMMANDS = {
    "fit": Command("train, validating as it goes", partial(_experiment, "fit"), True, ALL, True),
    "validate": Command(
        "evaluate on the validation split", partial(_experiment, "validate"), True, ALL, True
    ),
    "test": Command("evaluate on the test split", partial(_experiment, "test"), True, ALL, True),
    "predict": Command(
        "write masks; --input FILES of any kind, or a config's folder",
        partial(_experiment, "predict"),
        needs=ALL,
    ),
    "study": Command("compare arms over seeds in paired runs, to a plan", _study, False),
    "export": Command(
        "write a checkpoint as onnx, openvino, torch_export, safetensors", _export, False
    ),
    "report": Command("write an HTML page and a model card about runs", _report, False),
    "equalize": Command("write an equalized initial checkpoint", _equalize, True, ALL, True),
    "summary": Command(
        "parameters, multiply-adds, memory and fusions of a network", _summary, needs=ALL
    ),
    "models": Command("list encoders, heads and networks, and what they cost", _models, False),
    "init": Command("write a config for a folder of images and masks", commands.init, False),
    "prepare": Command(
        "fetch a data set; coco, labelme: polygons to masks", commands.prepare, needs=DATA
    ),
    "doctor": Command("examine every file of a data set", commands.doctor, True, DATA, True),
    "browse": Command(
        "write a contact sheet of training samples", commands.browse, True, DATA, True
    ),
}
