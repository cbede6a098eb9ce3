"""Read COCO's JSON: polygons, run-length encodings and crowds, by pycocotools.

Where regions overlap, larger ones are drawn first, so that small objects stay visible on large
ones; equal ones in the order of the file. COCO itself states no order.
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seglab.data.errors import DataError
from seglab.data.sources.drawing import Picture, Region
from seglab.data.sources.source import Shape
from seglab.sentences import listed


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: If it is not there or no JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def read_coco(path: Path, images: Path) -> tuple[list[Picture], list[str]]:
    """Return the pictures of a COCO file and its class names, in the order of the category ids.

    Args:
        path: JSON file with `images`, `annotations` and `categories`.
        images: Folder that `file_name` is relative to.

    Raises:
        DataError: If the file is no such file, or ids in it lead nowhere.
    """
    _require_pycocotools()
    content = read_json(path)
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
        raise DataError(f"{path} is no COCO file: it must hold lists of {', '.join(keys)}")
    try:
        return _read(content, path, images)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no COCO file: an entry lacks {error}") from error


def _read(content: Any, path: Path, images: Path) -> tuple[list[Picture], list[str]]:
    names = {c["id"]: str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
    _check_ids(content, names, path)
    of_image: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    pictures = [
        Picture(
            images / _relative(entry["file_name"], path),
            Path(entry["file_name"]).with_suffix(".png"),
            (entry["height"], entry["width"]) if "height" in entry else None,
            tuple(names[annotation["category_id"]] for annotation in of_image[entry["id"]]),
            partial(_regions, of_image[entry["id"]], names, path),
            f"{path.name}, image {entry['id']}",
        )
        for entry in content["images"]
    ]
    return pictures, [*names.values()]


def _relative(name: str, path: Path) -> Path:
    """Refuse names of files elsewhere: masks would be written there."""
    file = Path(name)
    if file.is_absolute() or ".." in file.parts:
        raise DataError(f"{path}: the file name {name!r} must lie in --images; make it relative")
    return file


def _check_ids(content: Any, names: Mapping[Any, str], path: Path) -> None:
    repeated = sorted({name for name in names.values() if [*names.values()].count(name) > 1})
    if repeated or len(names) < len(content["categories"]):
        raise DataError(f"{path}: categories must differ in id and name; repeated: {repeated}")
    known = {entry["id"] for entry in content["images"]}
    if len(known) < len(content["images"]):
        raise DataError(f"{path}: two images have one id")
    for key, ids in (("image_id", known), ("category_id", names.keys())):
        lost = [str(a.get("id", a)) for a in content["annotations"] if a[key] not in ids]
        if lost:
            raise DataError(
                f"{path}: {len(lost)} annotation(s) have a {key} that is not in the file: "
                f"{listed(lost)}; correct or remove them"
            )


def _regions(
    annotations: Sequence[Mapping[str, Any]], names: Mapping[Any, str], path: Path, shape: Shape
) -> list[Region]:
    from pycocotools import mask as coder

    encoded = [_encode(annotation, path, shape) for annotation in annotations]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        areas = [int(coder.area(one)) for one in encoded]
    order = sorted(range(len(encoded)), key=lambda i: -areas[i])
    return [
        Region(names[annotations[i]["category_id"]], partial(_decode, encoded[i])) for i in order
    ]


def _encode(annotation: Mapping[str, Any], path: Path, shape: Shape) -> Any:
    """Run-length encoding of an annotation's polygons or of what is one already."""
    from pycocotools import mask as coder

    where = f"{path}: annotation {annotation.get('id')}"
    given = annotation.get("segmentation")
    if not given:
        raise DataError(f"{where} has no segmentation, only a box; draw it or remove it")
    height, width = shape
    if isinstance(given, dict):
        if [*given.get("size", ())] != [height, width]:
            raise DataError(
                f"{where} encodes a mask of {given.get('size')} pixels for an image of "
                f"{[height, width]} (height, width)"
            )
        counts = given["counts"]
        if not isinstance(counts, list):
            return _check_packed(given, where)
        if sum(counts) != height * width:
            raise DataError(f"{where} encodes {sum(counts)} pixels, not {height} x {width}")
        return coder.frPyObjects(given, height, width)
    for polygon in given:
        if len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"{where} has a polygon of {len(polygon)} numbers; it takes 6, 8, ...")
        if not np.isfinite(polygon).all():
            raise DataError(f"{where} has a polygon with a corner that is no number")
    return coder.merge(coder.frPyObjects(given, height, width))


def _check_packed(given: Any, where: str) -> Any:
    """Decode once: pycocotools says what is wrong with a compressed encoding only then."""
    try:
        _decode(given)
    except Exception as error:  # whatever the broken text leads it to
        raise DataError(f"{where} has a run-length encoding that is broken: {error}") from error
    return given


def _decode(encoded: Any) -> NDArray[np.bool_]:
    from pycocotools import mask as coder

    with warnings.catch_warnings():  # it converts arrays in a way that NumPy 2 will drop
        warnings.simplefilter("ignore", DeprecationWarning)
        inside: NDArray[np.bool_] = coder.decode(encoded).astype(bool)
    return inside


def _require_pycocotools() -> None:
    try:
        import pycocotools.mask  # noqa: F401  # whether it is there
    except ImportError as error:
        raise DataError(
            "COCO's polygons are read by pycocotools: pip install pycocotools"
        ) from error
