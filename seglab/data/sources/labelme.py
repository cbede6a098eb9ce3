"""Read Labelme's JSON files, one per image, and draw their shapes as Labelme's own converter does.

Shapes are drawn in the order of the file, later ones over earlier ones, borders included. What has
no area (points and lines) is refused.
"""

import base64
import binascii
import io
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seglab.data.errors import DataError, MissingDataError
from seglab.data.sources.coco import read_json
from seglab.data.sources.drawing import IGNORE, Picture, Region
from seglab.data.sources.source import Shape
from seglab.sentences import listed

SPECIAL = {"__ignore__": IGNORE, "_background_": "background"}  # labels of Labelme's converter
KINDS = ("polygon", "oriented_rectangle", "rectangle", "circle", "mask")


def read_labelme(folder: Path, images: Path, background: str) -> tuple[list[Picture], list[str]]:
    """Return the pictures of a folder of Labelme's files, and its labels in alphabetical order.

    Args:
        folder: Of JSON files, subfolders included.
        images: Folder that all images are in; masks take their paths in it.
        background: What the label `_background_` means.

    Raises:
        DataError: If there are no files, a JSON file is not Labelme's, an image lies elsewhere, or
            a shape has no area.
    """
    paths = sorted(folder.rglob("*.json"))
    if not paths:
        raise MissingDataError(f"no JSON file in {folder}; give the folder of Labelme's files")
    special = SPECIAL | {"_background_": background}
    pictures = [_read(path, images, special) for path in paths]
    labels = {label for picture in pictures for label in picture.labels}
    return pictures, sorted(labels - {IGNORE, background})


def _read(path: Path, images: Path, special: dict[str, str]) -> Picture:
    content = read_json(path)
    if not isinstance(content, dict) or not {"shapes", "imagePath"} <= content.keys():
        raise DataError(f"{path} is no file of Labelme (no shapes, no imagePath); move it away")
    image = path.parent / content["imagePath"].replace("\\", "/")
    name = _place_in(images, image)
    if name is None:
        raise DataError(f"{path}: its image {image} is not in {images}; set --images")
    shapes = content["shapes"] or []
    lacking = [shape for shape in shapes if not {"label", "points"} <= {*shape}]
    if lacking:
        raise DataError(f"{path} has {len(lacking)} shape(s) without label or points")
    kinds = Counter(_kind(shape) for shape in shapes if _kind(shape) not in KINDS)
    if kinds:
        seen = listed([f"{count} {kind}" for kind, count in kinds.items()])
        raise DataError(f"{path} has shapes without an area: {seen}; draw polygons or remove them")
    names = (str(shape["label"]) for shape in shapes)
    labels = tuple(special.get(name, name) for name in names)
    height, width = content.get("imageHeight"), content.get("imageWidth")
    return Picture(
        image,
        name.with_suffix(".png"),
        (int(height), int(width)) if height and width else None,
        labels,
        partial(_regions, shapes, labels, path),
        path.name,
    )


def _place_in(folder: Path, file: Path) -> Path | None:
    """The path of a file in a folder, whether or not either is reached by links; None outside."""
    for settle in (os.path.abspath, os.path.realpath):
        whole, root = Path(settle(file)), Path(settle(folder))
        if whole.is_relative_to(root):
            return whole.relative_to(root)
    return None


def _kind(shape: dict[str, Any]) -> str:
    return str(shape.get("shape_type") or "polygon")


def _regions(
    shapes: Sequence[dict[str, Any]], labels: Sequence[str], path: Path, size: Shape
) -> list[Region]:
    pairs = zip(shapes, labels, strict=True)
    return [Region(label, partial(_draw, shape, path, size)) for shape, label in pairs]


def _draw(shape: dict[str, Any], path: Path, size: Shape) -> NDArray[np.bool_]:
    from PIL import Image, ImageDraw

    points = [(float(x), float(y)) for x, y in shape["points"]]
    kind = _kind(shape)
    _check_points(kind, points, shape["label"], path)
    if kind == "mask":
        return _paste(shape, points, path, size)
    picture = Image.new("1", size[::-1])
    draw = ImageDraw.Draw(picture)
    if kind == "circle":
        (x, y), rim = points
        radius = float(np.hypot(rim[0] - x, rim[1] - y))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1, outline=1)
    elif kind == "rectangle":
        (left, right), (top, bottom) = (sorted(values) for values in zip(*points, strict=True))
        draw.rectangle((left, top, right, bottom), fill=1, outline=1)
    else:
        draw.polygon(points, fill=1, outline=1)
    return np.array(picture)


def _check_points(kind: str, points: Sequence[tuple[float, float]], label: str, path: Path) -> None:
    is_polygon = kind in ("polygon", "oriented_rectangle")
    if not np.isfinite(points).all():
        raise DataError(f"{path}: a {kind} of {label!r} has a corner that is no number")
    if len(points) < 3 if is_polygon else len(points) != 2:
        wanted = "3 or more" if is_polygon else "2"
        raise DataError(
            f"{path}: a {kind} of {label!r} has {len(points)} point(s), not {wanted}; draw it again"
        )


def _paste(
    shape: dict[str, Any], points: Sequence[tuple[float, float]], path: Path, size: Shape
) -> NDArray[np.bool_]:
    """A mask that Labelme keeps as a PNG for the box of two corners, both included."""
    from PIL import Image

    (left, top), (right, bottom) = ((round(x), round(y)) for x, y in points)
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as file:
            part = np.array(file).astype(bool)
    except (KeyError, OSError, binascii.Error) as error:
        raise DataError(
            f"{path}: the mask of {shape['label']!r} cannot be read: {error}"
        ) from error
    whole = np.zeros(size, bool)
    place = whole[top : bottom + 1, left : right + 1]
    if min(left, top) < 0 or part.shape != place.shape:
        raise DataError(
            f"{path}: the mask of {shape['label']!r} has {part.shape[1]}x{part.shape[0]} pixels, "
            f"which do not fit its box in the image"
        )
    place[...] = part
    return whole
