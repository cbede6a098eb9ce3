"""Draw regions into masks, once, into a new folder that is complete or not there."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seglab.data.download import Progress, silent
from seglab.data.errors import DataError, MissingDataError
from seglab.data.sources.class_list import write_class_list
from seglab.data.sources.labels import check_class_count
from seglab.data.sources.reading import has_orientation, read_shape
from seglab.data.sources.source import IGNORE_INDEX, Shape
from seglab.sentences import listed
from seglab.visualize import color_table, save_mask

IGNORE = "ignore"  # as background: pixels in no region are 255; as a label: the region is 255


class Region(NamedTuple):
    """A labelled part of an image, and a function that makes its boolean mask (H, W)."""

    label: str
    draw: Callable[[], NDArray[np.bool_]]


class Picture(NamedTuple):
    """An image whose regions are known.

    Attributes:
        image: Its file.
        mask: Path of its mask, relative to the folder of masks.
        shape: Height and width that the annotation states; None: it states none.
        labels: Labels of its regions, for checks before anything is drawn.
        regions: Makes the regions, the lowest first: later ones are drawn over earlier ones.
        source: What to call the annotation in errors.
    """

    image: Path
    mask: Path
    shape: Shape | None
    labels: tuple[str, ...]
    regions: Callable[[Shape], Sequence[Region]]
    source: str


class Conversion(NamedTuple):
    """What was drawn."""

    class_names: tuple[str, ...]
    n_masks: int
    n_regions: int
    n_empty: int  # regions without a pixel inside their image
    n_hidden: int  # regions that others cover wholly
    n_turned: int  # photographs that are turned as EXIF says


def draw_masks(
    pictures: Sequence[Picture],
    output: Path,
    class_names: Sequence[str],
    background: str = "background",
    progress: Progress = silent,
) -> Conversion:
    """Check everything that can be checked, then write one mask per picture and the class list.

    Args:
        pictures: Images and their regions.
        output: Folder of masks, which must not exist yet or be empty.
        class_names: Of all labels, by id ("ignore" is none); `background` is put before them if it
            is not among them.
        background: Class of the pixels in no region; "ignore" makes them 255.
        progress: Called with (what, masks done, masks in all).

    Raises:
        DataError: If the folder has files, an image is missing or of another size, two masks would
            have one name, or a label is in no class; nothing is written then.
    """
    names = [name for name in class_names if name != IGNORE]
    if len({*names}) < len(names):
        raise DataError(f"classes must differ: {', '.join(names)}")
    if background != IGNORE and background not in names:
        names.insert(0, background)
    check_class_count(len(names))
    if output.exists() and any(output.iterdir()):
        raise DataError(f"{output} has files already; name another --output, or remove it")
    _check_labels(pictures, names)
    _check_pictures(pictures)
    ids = {name: label for label, name in enumerate(names)} | {IGNORE: IGNORE_INDEX}
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        counts = Counter[str]()
        for number, picture in enumerate(pictures, 1):
            counts.update(_draw(picture, part, ids, ids[background], len(names)))
            progress(output.name, number, len(pictures))
        write_class_list(part, names)
        part.chmod(0o755)  # mkdtemp's is closed to others
        part.replace(output)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    n_turned = sum(has_orientation(picture.image) for picture in pictures)
    n_regions, n_empty, n_hidden = (counts[kind] for kind in ("regions", "empty", "hidden"))
    return Conversion(tuple(names), len(pictures), n_regions, n_empty, n_hidden, n_turned)


def _draw(
    picture: Picture, folder: Path, ids: dict[str, int], background: int, n_classes: int
) -> Counter[str]:
    """Write one mask; count its regions."""
    shape = read_shape(picture.image)
    regions = picture.regions(shape)
    table = np.array([background, *(ids[region.label] for region in regions)], np.uint8)
    numbers, n_empty = np.zeros(shape, np.int32), 0
    for number, region in enumerate(regions, 1):
        inside = region.draw()
        n_empty += not inside.any()
        numbers[inside] = number
    n_seen = np.count_nonzero(np.unique(numbers))
    save_mask(folder / picture.mask, table[numbers], color_table(None, n_classes))
    return Counter(regions=len(regions), empty=n_empty, hidden=len(regions) - n_empty - int(n_seen))


def _check_labels(pictures: Iterable[Picture], names: Sequence[str]) -> None:
    unknown = Counter(
        label for p in pictures for label in p.labels if label not in (*names, IGNORE)
    )
    if unknown:
        near = {label: get_close_matches(label, names, n=1) for label in unknown}
        seen = [
            f"{label!r} ({count} region(s){''.join(f', near {name!r}' for name in near[label])})"
            for label, count in unknown.most_common()
        ]
        raise DataError(
            f"{len(unknown)} label(s) are no class: {listed(seen)}; add them to --classes, or "
            f"correct them; classes are {', '.join(names)}"
        )


def _check_pictures(pictures: Sequence[Picture]) -> None:
    missing = [str(p.image) for p in pictures if not p.image.is_file()]
    if missing:
        raise MissingDataError(
            f"{len(missing)} annotated image(s) are not there: {listed(missing)}; --images is the "
            "folder that the annotations' file names are relative to"
        )
    homes: dict[Path, Picture] = {}
    for picture in pictures:
        other = homes.setdefault(picture.mask, picture)
        if other is not picture:
            raise DataError(
                f"{other.image} ({other.source}) and {picture.image} ({picture.source}) would have "
                f"one mask, {picture.mask}; rename or remove one"
            )
        found = read_shape(picture.image)
        if picture.shape not in (None, found):
            raise DataError(_describe_sizes(picture, found))


def _describe_sizes(picture: Picture, found: Shape) -> str:
    height, width = picture.shape or found
    turned = (
        " (its EXIF orientation turns it: annotate what viewers show)"
        if has_orientation(picture.image)
        else ""
    )
    return (
        f"{picture.image} is {found[1]}x{found[0]} pixels, but {picture.source} was drawn on "
        f"{width}x{height}{turned}; annotate the image at its own size"
    )
