"""Commands around a run: get the data, examine it, look at it, equalize once, sum a network up.

Those about data need only the config's `data` section and build nothing else; each takes the
configs and `--data.*` arguments of `fit`, and a few of its own.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser as PlainParser
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from seglab.data.base import SegmentationDataModule
    from seglab.experiment import Experiment


def prepare(args: list[str]) -> None:
    """Download, check and unpack the data set of a config."""
    _, rest = _own_options("prepare", args, {})
    data = read_data(rest)
    data.prepare(show_progress)
    print("prepared: python train.py doctor with the same arguments examines every file")


def doctor(args: list[str]) -> None:
    """Examine every file of a data set; exit code 1 if something is wrong."""
    options, rest = _own_options("doctor", args, {"--num_workers": (8, "threads that read files")})
    from seglab.data.doctor import doctor as examine

    diagnosis = examine(read_data(rest), num_workers=options.num_workers, progress=show_progress)
    print(diagnosis)
    raise SystemExit(bool(diagnosis.faults))


def browse(args: list[str]) -> None:
    """Write a contact sheet of augmented training samples."""
    own = {
        "--output": ("samples.png", "picture file to write"),
        "--n_samples": (12, "number of samples"),
    }
    options, rest = _own_options("browse", args, own)
    from seglab.data.browse import browse as draw

    print(draw(read_data(rest), options.output, n_samples=options.n_samples))


def equalize(args: list[str], build: Callable[[list[str]], Experiment]) -> None:
    """Write an initial checkpoint whose fusions are equalized; trains nothing.

    For strategies that shard the model before `fit`: train from the file with
    ``--model.weights FILE --scale_equalization.mode off``.
    """
    own = {"--output": ("equalized.ckpt", "checkpoint file to write")}
    options, rest = _own_options("equalize", args, own)
    whole = ["--trainer.max_steps=0", "--trainer.max_epochs=1", "--trainer.limit_val_batches=0"]
    alone = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.logger=false"]
    experiment = build([*rest, *whole, *alone, "--trainer.enable_checkpointing=false"])
    experiment.trainer.fit(experiment.model, experiment.datamodule)
    import torch

    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": experiment.model.state_dict(), "scale_equalized": True}, path)
    print(f"{path}: train from it with --model.weights {path} --scale_equalization.mode off")


def read_data(args: Sequence[str]) -> SegmentationDataModule:
    """Build the data module that configs and `--data.*` arguments describe.

    Other sections of the configs are not looked at.
    """
    import yaml
    from jsonargparse import ArgumentParser

    from seglab.config_files import check_configs
    from seglab.data.base import SegmentationDataModule

    check_configs(list(args))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", "-c", action="append", default=[])
    parser.add_subclass_arguments(SegmentationDataModule, "data", required=True)
    files, given = _split_configs(args)
    sections = [yaml.safe_load(Path(file).read_text()).get("data") for file in files]
    texts = [f"--data={yaml.safe_dump(s, default_flow_style=True)}" for s in sections if s]
    ours = [argument for argument in given if argument.startswith("--data")]
    config = parser.parse_args([*texts, *ours])
    data: SegmentationDataModule = parser.instantiate(config).data
    return data


def show_progress(what: str, done: int, total: int | None) -> None:
    """One line on a terminal, rewritten as the work goes on; nothing elsewhere."""
    if not sys.stderr.isatty():
        return
    share = f"{100 * done / total:5.1f} %" if total else f"{done:,}"
    end = "\n" if total is not None and done >= total else ""
    print(f"\r{what}: {share}   ", end=end, file=sys.stderr, flush=True)


def _own_options(
    command: str, args: list[str], options: dict[str, tuple[Any, str]]
) -> tuple[Namespace, list[str]]:
    """A command's own options, and the arguments that are left for the config's parser."""
    parser = PlainParser(
        prog=f"train.py {command}",
        usage=f"python train.py {command} --config FILE [--data.KEY VALUE ...]"
        + "".join(f" [{name} {default}]" for name, (default, _) in options.items()),
        allow_abbrev=False,
    )
    for name, (default, text) in options.items():
        parser.add_argument(name, default=default, type=type(default), help=text)
    return parser.parse_known_args(args)


def _split_configs(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The config files among the arguments, and everything else as `--key=value`."""
    files: list[str] = []
    joined: list[str] = []
    items = iter(args)
    for item in items:
        name, equals, value = item.partition("=")
        if not equals and name.startswith("-"):
            value = next(items, "")
        if name in ("--config", "-c"):
            files.append(value)
        else:
            joined.append(f"{name}={value}")
    return files, joined
