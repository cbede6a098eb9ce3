"""Write a complete, commented config for a folder of images and masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import join, quote
from textwrap import fill
from typing import TYPE_CHECKING, Any

import yaml

from seglab.cli.program import command_line

if TYPE_CHECKING:
    from seglab.data.inspection.guess import Guess

_RARE = 0.2  # of an even share
_MULTIPLE = 32  # of crop sides
_LARGEST_CROP = 512
_LARGE_IMAGE = 1024 * 1024  # pixels; larger ones are evaluated one by one

TEMPLATE = """\
# {program} fit --config {path}
#
# Written by `{program} init {root}`: {n_images} pairs, images about {width} x {height}.
{remarks}# Look at it before training:
#   {program} doctor --config {path}    every file, every label value
#   {program} browse --config {path}    what the network will see

seed_everything: 0

trainer:
  max_steps: {max_steps}
  val_check_interval: {interval}
  check_val_every_n_epoch: null
  log_every_n_steps: {log_interval}

data:
  class_path: seglab.data.FolderDataModule
  init_args:
{data}
    batch_size: {batch_size}  # of one device; halve it where memory is short
    num_workers: 2

model:
  network:
    class_path: seglab.models.Segmenter
    init_args:
{normalization}      encoder:
        class_path: seglab.models.TimmEncoder
        init_args:
          name: {encoder}  # any timm backbone with a feature pyramid
          pretrained: false  # true where the weights can be downloaded: worth many points
{in_channels}      head:
        class_path: seglab.models.heads.UPerHead
        init_args:
          channels: {channels}
      auxiliary:
        class_path: seglab.models.heads.FCNHead
        init_args:
          in_index: 2
          channels: {half}
          num_convs: 1
          concat_input: false
{loss}  optimizer:
    class_path: torch.optim.AdamW
    init_args:
      lr: 0.001  # 0.0001 with pretrained weights
      weight_decay: 0.05
  scheduler:
    class_path: seglab.optim.WarmupPolyLR
    init_args:
      warmup_steps: 100
      power: 0.9
"""


def write_config(
    root: Path, path: Path, overwrite: bool = False, patterns: tuple[str, str] | None = None
) -> Guess:
    """Guess what a folder holds and write the config that trains on it.

    Args:
        root: The folder.
        path: File to write.
        overwrite: Whether a file may be there already.
        patterns: `data.images` and `data.masks`, where they are known.

    Raises:
        FileExistsError: If there is a file already and it is not to be overwritten.
        DataError: If no images and masks are found; says how polygons become masks.
    """
    from seglab.data.errors import DataError, NoLayoutError, UnpairedError
    from seglab.data.inspection.guess import guess_folder
    from seglab.data.inspection.stock import VAL_NAMES

    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; name another file with --output")
    try:
        guess = guess_folder(root, patterns)
    except NoLayoutError as error:
        drawing = "" if error.is_near else _how_to_draw(root)
        raise NoLayoutError(drawing or str(error), error.is_near) from error
    except UnpairedError as error:  # training images have masks, those of another split have none
        splits = [root / name for name in VAL_NAMES if (root / name).is_dir()]
        drawing = next(filter(None, map(_how_to_draw, splits)), "")
        raise DataError(drawing + _same_classes(root) if drawing else str(error)) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(guess, root, path))
    return guess


def _same_classes(root: Path) -> str:
    """The option that gives another split the classes of the masks that were drawn already."""
    from seglab.data.sources.class_list import CLASS_LIST

    lists = sorted(root.rglob(CLASS_LIST))
    if not lists:
        return ""
    names = ",".join(line.strip() for line in lists[0].read_text().splitlines() if line.strip())
    return f" --classes {quote(names)}"


def _how_to_draw(root: Path) -> str:
    """The command that makes masks of the polygons in a folder; empty if there are none."""
    from seglab.cli.polygons import init_arguments
    from seglab.data.inspection.known_layouts import IMAGE_FOLDERS
    from seglab.data.inspection.stock import find_polygons

    found = find_polygons(root)
    if found is None:
        return ""
    images = found.images
    masks = (images.parent if images.name in IMAGE_FOLDERS and images != root else images) / "masks"
    if masks.is_dir():
        typed = join([*command_line().split(), "init", *init_arguments(images, masks)])
        return f"{root} holds masks in {masks}, in no layout that is known; type: {typed}"
    command = [*command_line().split(), "prepare", found.kind, str(found.source)]
    if images != found.source:
        command += ["--images", str(images)]
    command += ["--output", str(masks)]
    name = {"labelme": "Labelme", "coco": "COCO"}[found.kind]
    more = f" (then the other {found.n_others} JSON file(s), with the same --classes)"
    return (
        f"{root} holds polygons of {name} ({found.n_files} JSON file(s) at {found.source}) and no "
        f"masks; draw them first{more * bool(found.n_others)}: {join(command)}"
    )


def render(guess: Guess, root: Path, path: Path) -> str:
    """Return the config's text."""
    import torch

    has_gpu = torch.cuda.is_available()
    crop = [_crop(side, has_gpu) for side in guess.shape]
    channels = guess.arguments.get("channels", 3)
    data = {
        "root": str(root),
        "class_names": guess.class_names,
        **guess.arguments,
        "crop_size": crop,
    }
    if guess.shape[0] * guess.shape[1] > _LARGE_IMAGE:
        data["eval_batch_size"] = 1
    batch_size = 8 if has_gpu else 4
    steps = 20000 if has_gpu else 2000
    return TEMPLATE.format(
        program=command_line(),
        path=path,
        root=root,
        n_images=guess.n_images,
        height=guess.shape[0],
        width=guess.shape[1],
        remarks="".join(map(_comment, guess.remarks)),
        max_steps=steps,
        interval=steps // 10,
        data=_indent(data, 4),
        batch_size=batch_size,
        log_interval=max(1, min(20, guess.n_images // 2 // batch_size)),  # not above one epoch
        encoder="resnet50" if has_gpu else "resnet18",
        channels=256 if has_gpu else 64,
        half=128 if has_gpu else 32,
        normalization=_normalization(guess),
        loss=_loss(guess.shares),
        in_channels="" if channels == 3 else f"          in_channels: {channels}\n",
    )


def _crop(side: int, has_gpu: bool) -> int:
    largest = _LARGEST_CROP if has_gpu else _LARGEST_CROP // 2
    return max(_MULTIPLE, min(largest, side // _MULTIPLE * _MULTIPLE))


def _loss(shares: Sequence[float]) -> str:
    """A loss that weighs classes, where one is so rare that nothing of it might be found."""
    if not shares or min(shares) == 0 or min(shares) > _RARE / len(shares):
        return ""
    rarest = min(shares)
    weights = [max(0.01, round((rarest / share) ** 0.5, 2)) for share in shares]
    return (
        "  loss:\n"
        "    class_path: seglab.losses.CrossEntropy\n"
        "    init_args:\n"
        f"      # One over the root of each share: the rarest class has {rarest:.1%} of pixels\n"
        f"      class_weight: {weights}\n"
    )


def _comment(remark: str) -> str:
    return fill(remark, 99, initial_indent="# - ", subsequent_indent="#   ") + "\n"


def _normalization(guess: Guess) -> str:
    if guess.bands is None:
        return ""
    mean, std = guess.bands
    return f"      mean: {mean}  # of every band, in 0..255\n      std: {std}\n"


def _indent(section: dict[str, Any], n_blanks: int) -> str:
    text = yaml.safe_dump(section, sort_keys=False, default_flow_style=None, width=88)
    return "\n".join(" " * n_blanks + line for line in text.rstrip().splitlines())
