"""`prepare coco` and `prepare labelme`: polygons become masks, once."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING

from seglab.cli.arguments import ConfigError
from seglab.cli.command_parser import CommandParser
from seglab.cli.program import command_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from seglab.data.sources.drawing import Conversion, Picture

FORMATS = ("coco", "labelme")
SPLITS = ("train", "val", "valid", "validation", "test")
ORDERS = {
    "coco": "larger regions are drawn first, so that smaller ones lie above them",
    "labelme": "shapes are drawn in the order of the file, later ones above earlier ones",
}


def prepare_masks(args: list[str]) -> None:
    """Turn polygons into masks that `init` and `fit` read."""
    kind, *rest = args
    if kind not in FORMATS:
        raise ConfigError(
            f"prepare: no format {kind!r}; there are {' and '.join(FORMATS)}, and --config NAME "
            "for its own data"
        )
    options = _parser(kind).parse_args(rest)
    from seglab.cli.progress import progress_bar
    from seglab.data.sources.drawing import draw_masks

    images = options.images or options.source
    if kind == "coco":
        from seglab.data.sources.coco import read_coco

        pictures, names = read_coco(options.source, images)
    else:
        from seglab.data.sources.labelme import read_labelme

        pictures, names = read_labelme(options.source, images, options.background)
    if options.classes:
        names = [name.strip() for name in options.classes.split(",")]
    with progress_bar("images") as progress:
        done = draw_masks(pictures, options.output, names, options.background, progress)
    _report(done, options.output, ORDERS[kind], _unlisted(pictures, images, options.output))
    print(f"next: {command_line()} {join(['init', *init_arguments(images, options.output)])}")


def init_arguments(images: Path, masks: Path) -> list[str]:
    """What `init` needs to find images and masks: their common folder, of all splits, and patterns.

    Patterns are left out where `init` would guess the same.
    """
    from seglab.data.errors import DataError
    from seglab.data.inspection.known_layouts import guess_layout
    from seglab.data.sources.layouts import find_pairs

    images, masks = (Path(os.path.abspath(path)) for path in (images, masks))
    root = Path(os.path.commonpath([images, masks]))
    root = root.parent if root.name in SPLITS else root
    places = [folder.relative_to(root).parts for folder in (images, masks)]
    split = next((name for name in SPLITS if all(name in place for place in places)), "")
    ends = ("**/*", "{subfolder}/{stem}.png")
    patterns = [
        "/".join([*("{split}" if part == split else part for part in place), end])
        for place, end in zip(places, ends, strict=True)
    ]
    shown = os.path.relpath(root) if root.is_relative_to(Path.cwd()) else str(root)
    try:
        _, items = guess_layout(root)
        if items == find_pairs(root, patterns[0], patterns[1], split or "train", ""):
            return [shown]
    except DataError:
        pass  # told what to do by the patterns
    return [shown, "--images", patterns[0], "--masks", patterns[1]]


def _parser(kind: str) -> CommandParser:
    parser = CommandParser(f"prepare {kind}", prepare_masks.__doc__)
    is_coco = kind == "coco"
    what = "COCO's JSON file" if is_coco else "folder of Labelme's JSON files"
    parser.add_argument("source", type=Path, help=what)
    parser.add_argument(
        "--images", type=Path, required=is_coco, help="folder of the images that it names"
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder for the masks")
    parser.add_argument(
        "--classes", help="a,b,c: labels in the order of their ids; the same for every split"
    )
    parser.add_argument(
        "--background",
        default="background",
        help="class of pixels in no polygon; 'ignore' leaves them out of training",
    )
    return parser


def _report(done: Conversion, output: Path, order: str, unlisted: Sequence[Path]) -> None:
    from seglab.sentences import listed

    print(f"{output}: {done.n_masks} masks, {done.n_regions} regions; {order}")
    print(f"  class_names: [{', '.join(done.class_names)}]")
    remarks = [
        (done.n_empty, "region(s) have no pixel inside their image"),
        (done.n_hidden, "region(s) are wholly covered by others"),
        (done.n_turned, "photograph(s) are turned as EXIF says: look at them with browse"),
        (len(unlisted), f"image(s) have no annotation and no mask: {listed(unlisted)}"),
    ]
    for count, text in remarks:
        if count:
            print(f"  - {count} {text}")


def _unlisted(pictures: Sequence[Picture], images: Path, masks: Path) -> list[Path]:
    """Images of the folder that no annotation names."""
    from seglab.data.sources.reading import IMAGE_SUFFIXES

    known = {picture.image.resolve() for picture in pictures}
    known |= {path.resolve() for path in masks.rglob("*")}
    found = (path for path in sorted(images.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES)
    return [path for path in found if path.resolve() not in known]
