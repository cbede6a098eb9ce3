"""Commands around a run: get the data, examine it, look at it, equalize once, sum a network up.

Those about data need only the config's `data` section and build nothing else; each takes the
configs and `--data.*` arguments of `fit`, and a few of its own.
"""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seglab.cli.arguments import ConfigError
from seglab.cli.check import check_arguments
from seglab.cli.command_parser import CommandParser, read_size
from seglab.cli.program import command_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from seglab.cli.experiment import Experiment
    from seglab.data.base import SegmentationDataModule


def prepare(args: list[str]) -> None:
    """Download, check and unpack the data set of a config; or turn polygons into masks."""
    from seglab.cli.polygons import prepare_masks

    if args and not args[0].startswith("-"):
        prepare_masks(args)
        return
    from seglab.cli.progress import progress_bar

    _, rest = _own_options("prepare", args, {})
    data = read_data(rest)
    with progress_bar("bytes") as progress:
        data.prepare(progress)
    print(f"prepared: {command_line()} doctor with the same arguments examines every file")


def init(args: list[str]) -> None:
    """Write a config for a folder of images and masks."""
    parser = CommandParser("init", init.__doc__)
    parser.add_argument("folder", type=Path, help="folder of images and masks")
    parser.add_argument("--output", type=Path, help="config to write; FOLDER's name by default")
    parser.add_argument("--images", help="pattern of the images in FOLDER, as 'photos/**/*'")
    parser.add_argument("--masks", help="where an image's mask is, as 'labels/{subfolder}/{stem}'")
    options = parser.parse_args(args)
    if (options.images is None) != (options.masks is None):
        parser.error("--images and --masks go together: give both, or none to have them guessed")
    from seglab.cli.init import write_config

    path = options.output or Path("configs", f"{options.folder.resolve().name}.yaml")
    patterns = (options.images, options.masks) if options.images else None
    guess = write_config(options.folder, path, patterns=patterns)
    print(f"{path}: {guess.n_images} pairs, {len(guess.class_names)} classes")
    for remark in guess.remarks:
        print(f"  - {remark}")
    print(f"next: {command_line()} doctor --config {path}")


def doctor(args: list[str]) -> None:
    """Examine every file of a data set; exit code 1 if something is wrong."""
    options, rest = _own_options("doctor", args, {"--num_workers": (8, "threads that read files")})
    if options.num_workers < 1:
        raise ValueError(f"--num_workers is {options.num_workers}; it must be at least 1")
    from seglab.cli.progress import progress_bar
    from seglab.data.inspection.doctor import doctor as examine

    data = read_data(rest)
    with progress_bar("images") as progress:
        diagnosis = examine(data, num_workers=options.num_workers, progress=progress)
    print(diagnosis)
    raise SystemExit(bool(diagnosis.faults))


def browse(args: list[str]) -> None:
    """Write a contact sheet of augmented training samples."""
    own = {
        "--output": ("samples.png", "picture file to write"),
        "--n_samples": (12, "number of samples"),
    }
    options, rest = _own_options("browse", args, own)
    from seglab.data.sources.reading import IMAGE_SUFFIXES

    if Path(options.output).suffix.lower() not in IMAGE_SUFFIXES[:-1]:  # the last is NPY
        raise ValueError(f"--output {options.output} is no name of a picture: end it in .png")
    if options.n_samples < 1:
        raise ValueError(f"--n_samples is {options.n_samples}; it must be at least 1")
    from seglab.data.inspection.browse import browse as draw

    path = draw(read_data(rest), options.output, n_samples=options.n_samples)
    print(f"samples drawn: open {path.absolute()}")


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
    from seglab.checkpoint_files import write_checkpoint

    path = Path(options.output)
    write_checkpoint({"state_dict": experiment.model.state_dict(), "scale_equalized": True}, path)
    print(f"{path}: train from it with --model.weights {path} --scale_equalization.mode off")


def summary(
    args: list[str],
    build: Callable[[list[str]], Experiment],
    find_fusions: Callable[..., Sequence[Any]],
) -> None:
    """Print parameters, multiply-adds, memory and fusions of a config's network."""
    own = {"--size": ("", "height,width of the image; default: the training crop")}
    options, rest = _own_options("summary", args, own)
    try:
        size = read_size(options.size) if options.size else None
    except ArgumentTypeError as error:
        raise ConfigError(f"summary: --size {error}") from error
    machine = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
    experiment = build([*rest, *machine, "--trainer.precision=32-true", *_untrained(rest)])
    from seglab.summary import GIB, summarize

    data: Any = experiment.datamodule
    crop = data.crop_size or (getattr(data, "size", 512),) * 2
    size = size or (crop[0], crop[1])
    network: Any = experiment.model.network
    costs = summarize(network, size)
    print(costs)
    memory = costs.training_memory(data.batch_size) / GIB
    print(f"{memory:.2f} GiB at least to train with {data.batch_size} images a device, float32")
    import torch

    network.train()
    for fusion in find_fusions(network, torch.zeros(2, network.in_channels, *size)):
        print(f"fusion {fusion.name} {list(fusion.weight_shape)}")
        for branch in fusion.branches:
            resized = f"{branch.upsampling:.3g}x {branch.interpolation}"
            resized = resized if branch.interpolation else "as it is"
            print(f"  {branch.start:>5}:{branch.stop:<5} {branch.source:<40} {resized}")


def _untrained(args: Sequence[str]) -> list[str]:
    """Arguments that build the encoder without fetching its weights, where a config asks for."""
    import yaml

    place = ("model", "network", "init_args", "encoder", "init_args")
    for file in _split_configs(args)[0]:
        section: Any = yaml.safe_load(Path(file).read_text())
        for key in place:
            section = (section or {}).get(key)
        if section and ("pretrained" in section or "checkpoint_path" in section):
            return [f"--{'.'.join(place)}.pretrained=false"]
    return []


def read_data(args: Sequence[str]) -> SegmentationDataModule:
    """Build the data module that configs and `--data.*` arguments describe.

    Other sections of the configs are not looked at.
    """
    import yaml
    from jsonargparse import ArgumentParser

    from seglab.cli.config_files import check_configs
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


def _own_options(
    command: str, args: list[str], options: dict[str, tuple[Any, str]]
) -> tuple[Namespace, list[str]]:
    """A command's own options, and the arguments that are left for the config's parser."""
    usage = f"{command_line()} {command} --config FILE [--data.KEY VALUE ...]"
    usage += "".join(f" [{name} {default}]" for name, (default, _) in options.items())
    parser = CommandParser(command, usage=usage)
    for name, (default, text) in options.items():
        parser.add_argument(name, default=default, type=type(default), help=text)
    found, rest = parser.parse_known_args(args)
    needed = () if command in ("equalize", "summary") else ("data",)
    check_arguments(rest, True, needed, own=[name.removeprefix("--") for name in options])
    return found, rest


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
