"""`export`: a checkpoint as ONNX, as a program of torch.export, or as bare weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seglab.cli.command_parser import CommandParser, read_size
from seglab.cli.values import check_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from seglab.predictor import Predictor

FORMATS = ("onnx", "torch_export", "safetensors")
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
    options = parser.parse_args(args)
    check_checkpoint(str(options.ckpt_path))
    from seglab.export import SUFFIXES, export_network, refuse_missing_packages

    refuse_missing_packages(options.format)
    from seglab.predictor import load

    model = load(options.ckpt_path, device="cpu")
    images, remark = _real_images(model, options.ckpt_path, options.images)
    done = export_network(
        model.task.network,
        options.output or options.ckpt_path.with_suffix(SUFFIXES[options.format]),
        options.format,
        size=options.size,
        channels=model.image_format.channels,
        is_deep=model.image_format.value_range is not None,
        images=images,
        metadata=describe(model, options.size),
    )
    print(done)
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
        },
        "evaluation": {**asdict(model.task.inference), "eval_scale": model.eval_scale},
        "seglab_version": __version__,
    }


def _real_images(
    model: Predictor, checkpoint: Path, folder: Path | None
) -> tuple[list[Tensor], str]:
    """A few images as evaluation shows them to the network, and what is to be said of them."""
    import torch

    if folder is not None:
        from seglab.data.sources.listing import find_images_below, require_folder

        paths = list(find_images_below(require_folder(folder, "give --images a folder")).values())
        planes = [model.planes(model.read(path)) for path in paths[:N_REAL]]
        return [torch.from_numpy(image) for image in planes], ""
    try:
        dataset = _validation_set(checkpoint)
    except (ValueError, OSError) as error:
        return [], f"compared on random images only ({error}); --images FOLDER takes others"
    return [dataset[index]["image"] for index in range(min(N_REAL, len(dataset)))], ""


def _validation_set(checkpoint: Path) -> Any:
    import yaml
    from jsonargparse import ArgumentParser as ConfigParser

    from seglab.checkpoints import read_checkpoint
    from seglab.data.base import SegmentationDataModule

    section = read_checkpoint(checkpoint)["config"]["data"]
    parser = ConfigParser(exit_on_error=False)
    parser.add_subclass_arguments(SegmentationDataModule, "data", required=True)
    config = parser.parse_args([f"--data={yaml.safe_dump(section, default_flow_style=True)}"])
    data = parser.instantiate(config).data
    data.setup("validate")
    return data.val_dataset
