"""`export`: a checkpoint as ONNX, OpenVINO, a program of torch.export, or bare weights."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seglab.cli.command_parser import CommandParser, read_size
from seglab.cli.values import check_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from seglab.exported_scores import Scores
    from seglab.predictor import Predictor

FORMATS = ("onnx", "openvino", "torch_export", "safetensors")
CHECKED = ("onnx", "openvino")  # a runtime reads them
N_REAL = 2  # images of the validation set that a file is compared on


def export(args: list[str]) -> None:
    """Write a checkpoint's network as a file that runs elsewhere, compared before it is kept."""
    parser = CommandParser("export", export.__doc__)
    parser.add_argument("--ckpt_path", type=Path, required=True, help="a checkpoint of fit")
    parser.add_argument("--format", default="onnx", choices=FORMATS)
    parser.add_argument("--output", type=Path, help="file to write; beside the checkpoint if none")
    parser.add_argument(
        "--size", type=read_size, help="HEIGHT,WIDTH to fix, for networks that pool to a grid"
    )
    parser.add_argument(
        "--images",
        type=Path,
        help="folder of images to compare on; the validation set of the checkpoint if none",
    )
    _add_data_options(parser)
    options = parser.parse_args(args)
    if options.n_calibration < 1:
        parser.error(f"--n_calibration {options.n_calibration}: give at least 1")
    check_checkpoint(str(options.ckpt_path))
    from seglab.export import SUFFIXES, export_network, refuse_missing_packages

    options.output = options.output or options.ckpt_path.with_suffix(SUFFIXES[options.format])
    refuse_missing_packages(options.format, options.int8)
    if options.check_data and options.format not in CHECKED:
        parser.error(f"--check_data runs files of {' and '.join(CHECKED)}, not {options.format}")
    from seglab.loading import load

    model = load(options.ckpt_path, device="cpu")
    images, remark = _real_images(model, options)
    check = _Check(model, options) if options.check_data or options.int8 else None
    done = export_network(
        model.task.network,
        options.output,
        options.format,
        size=options.size,
        channels=model.image_format.channels,
        is_deep=model.image_format.value_range is not None,
        images=images,
        metadata=describe(model, options.size),
        calibration=check.calibration() if check and options.int8 else (),
        check=check,
    )
    print(done)
    if check:
        print(f"  - {'int8: ' if options.int8 else ''}{check.scores}")
    if remark:
        print(f"  - {remark}")


def describe(model: Predictor, size: tuple[int, int] | None) -> dict[str, Any]:
    """What a file says of itself: classes, colours, images and the rule of evaluation."""
    from seglab import __version__

    return {
        "class_names": list(model.class_names),
        "palette": model.palette.tolist(),
        "ignore_index": model.task.metrics["val"].ignore_index,
        "image": {
            "layout": "(batch, channels, height, width), RGB if three, 0..255",
            "size": list(size) if size else None,
            "channels": model.image_format.channels,
            "value_range": model.image_format.value_range,
            "drop_alpha": model.image_format.drop_alpha,
        },
        "evaluation": {**asdict(model.task.inference), "eval_scale": model.eval_scale},
        "seglab_version": __version__,
    }


def _real_images(model: Predictor, options: Namespace) -> tuple[list[Tensor], str]:
    """A few images as evaluation shows them to the network, and what is to be said of them."""
    import torch

    if (folder := options.images) is not None:
        from seglab.data.sources.listing import find_images_below, require_folder

        paths = list(find_images_below(require_folder(folder, "give --images a folder")).values())
        planes = [model.planes(model.read(path)) for path in paths[:N_REAL]]
        return [torch.from_numpy(image) for image in planes], ""
    try:
        dataset = load_data(options.ckpt_path, options.config).val_dataset
    except (ValueError, OSError) as error:
        return [], f"compared on random images only ({error}); --images FOLDER takes others"
    return [dataset[index]["image"] for index in range(min(N_REAL, len(dataset)))], ""


def _add_data_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--check_data",
        action="store_true",
        help="keep the file only if its mIoU on the validation set is the network's within 1e-4",
    )
    parser.add_argument(
        "--int8",
        action="store_true",
        help="quantize to 8-bit integers on training images; says what that loses and gains",
    )
    parser.add_argument("--n_calibration", type=int, default=64, help="training images for --int8")
    parser.add_argument(
        "--config", type=Path, help="config whose data to check on; the checkpoint's own if none"
    )


def load_data(checkpoint: Path, config: Path | None) -> Any:
    """The data module of a config, or of a checkpoint, set up for validation."""
    import yaml
    from jsonargparse import ArgumentParser as ConfigParser

    from seglab.checkpoints import read_checkpoint
    from seglab.data.base import SegmentationDataModule

    content = (
        yaml.safe_load(config.read_text()) if config else read_checkpoint(checkpoint)["config"]
    )
    if "data" not in content:
        raise ValueError(f"--config {config} has no section data: give one that has, or none")
    section = content["data"]
    parser = ConfigParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationDataModule, "data", required=True)
    parsed = parser.parse_args([f"--data={yaml.safe_dump(section, default_flow_style=True)}"])
    data = parser.instantiate(parsed).data
    data.setup("validate")
    return data


class _Check:
    """Scores a file on the validation set before it is kept.

    Args:
        model: The network.
        options: Of the command.
    """

    def __init__(self, model: Predictor, options: Namespace) -> None:
        self.model = model
        self.options = options
        self.data = load_data(options.ckpt_path, options.config)
        self.scores: Scores | None = None
        self._refuse_other_size()

    def _refuse_other_size(self) -> None:
        """Before anything is written: a file of one size is checked on images of that size."""
        size, window = self.options.size, self.model.task.inference.crop_size
        if size is None or not len(self.data.val_dataset):
            return
        found = window or tuple(self.data.val_dataset[0]["image"].shape[1:])
        if tuple(found) != size:
            raise ValueError(
                f"validation images are {tuple(found)} pixels and --size is {size}: leave --size"
                " out, or give theirs"
            )

    def calibration(self) -> list[Tensor]:
        """Training images, well spread, as evaluation shows them to the network."""
        from seglab.data.dataset import SegmentationDataset

        self.data.setup("fit")
        source, transform = self.data.train_dataset.source, self.data.val_dataset.transform
        images = SegmentationDataset(source, transform)
        n_images = min(self.options.n_calibration, len(images))
        chosen = [images[index * len(images) // n_images]["image"] for index in range(n_images)]
        window = self.model.task.inference.crop_size
        return chosen if window is None else [x[:, : window[0], : window[1]] for x in chosen]

    def __call__(self, path: Path) -> dict[str, Any]:
        """Score the file; its metadata gets what was found."""
        from seglab.cli.progress import progress_bar
        from seglab.exported_scores import refuse_loss, score_file

        with progress_bar("images") as progress:
            self.scores = score_file(self.model.task, path, self.data.val_dataset, progress)
        if not self.options.int8:
            refuse_loss(self.scores, self.options.output)
        return {**self.scores.to_dict(), "int8": self.options.int8}
