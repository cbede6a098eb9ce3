"""Guess from pixels what images and masks hold."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seglab.data.errors import DataError
from seglab.data.inspection.readable import Readable
from seglab.data.sources.class_list import ClassList
from seglab.data.sources.files import Item
from seglab.data.sources.labels import IGNORE_NAME, count_colors, unpack_color
from seglab.data.sources.masks import read_mask
from seglab.data.sources.reading import Array, ImageFormat, decode_image
from seglab.data.sources.source import IGNORE_INDEX

_N_IMAGES = 50  # decoded
_MIN_SHARE = 1e-3  # of the pixels: rarer colours, where there are many, are blended borders
_MAX_CLASSES = 64
_OUTLYING = 1000  # times the spread of nearly all values: what is farther out is no measurement

_WHITE = 0xFFFFFF
_RENAME = "replace class_0, class_1, ... by names"


class Found(NamedTuple):
    """What masks seem to hold: arguments of the data, names, remarks, share of each class."""

    arguments: dict[str, Any]
    class_names: list[str]
    remarks: list[str]
    shares: list[float]


class Bands(NamedTuple):
    """Mean and standard deviation of every band, in 0..255."""

    mean: list[float]
    std: list[float]


def guess_images(
    items: Sequence[Item], readable: Readable
) -> tuple[dict[str, Any], Bands | None, list[str]]:
    """Guess bands and range of values; measure the bands if they are no 8-bit RGB.

    Raises:
        DataError: If images differ in bands or depth, or hold values that are not finite.
    """
    some = items[:: -(-len(items) // _N_IMAGES)]
    pairs = [*readable.only(decode_image, some, "image")]
    arrays = [array for _, array in pairs]
    channels = Counter(1 if a.ndim == 2 else a.shape[2] for a in arrays).most_common(1)[0][0]
    found: dict[str, Any] = {}
    remarks = []
    if not (channels in (1, 3) or _is_opaque(arrays)):
        found["channels"] = channels
        if channels == 4 and all(array.dtype == np.uint8 for array in arrays):
            remarks.append(
                "the fourth band is taken for data; if it is transparency, put drop_alpha: true in "
                "the place of channels, and leave out in_channels, mean and std"
            )
    if any(array.dtype != np.uint8 for array in arrays):
        found["value_range"], remark = _guess_range(arrays)
        remarks.append(remark)
    if not found:
        return {}, None, []
    image_format = ImageFormat(found.get("channels", 3), found.get("value_range"))
    bands = _measure([image_format.convert(array, path) for path, array in pairs])
    remarks.append(
        f"mean and std of the bands come from {len(pairs)} image(s); doctor measures all"
    )
    return found, bands, remarks


def _guess_range(arrays: Sequence[Array]) -> tuple[list[float], str]:
    finite = [array[np.isfinite(array)] for array in arrays]
    # The outermost values may be marks of "no data", which `convert` then tells from the rest.
    low = min((float(np.percentile(v, 0.1)) for v in finite if v.size), default=0.0)
    high = max((float(np.percentile(v, 99.9)) for v in finite if v.size), default=1.0)
    lowest = min((float(v.min()) for v in finite if v.size), default=0.0)
    highest = max((float(v.max()) for v in finite if v.size), default=1.0)
    spread = _OUTLYING * max(high - low, 1e-6)
    low = low if lowest < low - spread else lowest
    high = high if highest > high + spread else highest
    top = 1.0 if high <= 1 else float(2 ** int(np.ceil(np.log2(high + 1))) - 1)
    remark = f"images hold values in {low:g}..{high:g}; value_range is a guess"
    return [min(0.0, low), top], remark


def _measure(images: Sequence[Array]) -> Bands:
    flat = [image.reshape(-1, image.shape[2]).astype(np.float64) for image in images]
    weights = [len(pixels) for pixels in flat]
    first = np.average([pixels.mean(0) for pixels in flat], axis=0, weights=weights)
    second = np.average([np.square(pixels).mean(0) for pixels in flat], axis=0, weights=weights)
    std = np.sqrt((second - first**2).clip(min=0))
    std = np.where(std < 1e-3, 1.0, std)  # a band that never changes
    rounded = [[float(f"{value:.5g}") for value in values] for values in (first, std)]
    return Bands(*rounded)


def _is_opaque(arrays: Sequence[Array]) -> bool:
    return all(
        a.ndim == 3 and a.shape[2] == 4 and a.dtype == np.uint8 and (a[..., 3] == 255).all()
        for a in arrays
    )


def guess_masks(items: Sequence[Item], classes: ClassList | None, readable: Readable) -> Found:
    """Guess classes, and colours or the map of raw values.

    Raises:
        DataError: If masks are of two kinds, were smoothed, or hold a single class.
    """
    ids: Counter[int] = Counter()
    colors: Counter[int] = Counter()
    examples: dict[bool, Path] = {}
    for path, mask in readable.only(read_mask, items, "mask"):
        examples.setdefault(mask.ndim == 3, path)
        if mask.ndim == 3:
            colors.update(count_colors(mask))
        else:
            values, counts = np.unique(mask, return_counts=True)
            ids.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    if colors and ids:
        raise DataError(
            f"mask {examples[True]} holds colours, {examples[False]} one band of ids; "
            "save all masks in one way"
        )
    found = _guess_colors(colors) if colors else _guess_ids(ids, classes)
    if len(found.class_names) < 2:
        raise DataError(
            f"the {len(items)} masks hold one value ({next(iter(colors or ids))}) besides 255: "
            "there is nothing to tell apart; label the rest too"
        )
    return found


def _guess_colors(colors: Counter[int]) -> Found:
    total = sum(colors.values())
    kept = [code for code, _ in colors.most_common()]
    if len(colors) > _MAX_CLASSES:
        kept = [code for code in kept[:_MAX_CLASSES] if colors[code] >= _MIN_SHARE * total]
    is_grey = all(len({*unpack_color(code)}) == 1 for code in kept)
    kept = sorted(kept) if is_grey else kept
    ignored = is_grey and len(kept) > 2 and _WHITE in kept
    kept = [code for code in kept if not (ignored and code == _WHITE)]
    names = [f"class_{number}" for number in range(len(kept))]
    order = "the order is that of the grey values" if is_grey else "the commonest colour is first"
    remarks = [
        f"{_RENAME}, in class_names and in colors: {order}; "
        "ignore: [..] takes the colour of unlabelled pixels"
    ]
    if ignored:
        remarks.append(f"255 ({colors[_WHITE] / total:.1%} of the pixels) is ignored")
    if sorted(kept) == [0, _WHITE]:
        kept, names = sorted(kept), ["background", "foreground"]
        remarks = ["replace background and foreground by names, in class_names and in colors"]
    n_rare = len(colors) - len(kept) - ignored
    if n_rare:
        remarks.append(
            f"{n_rare} colours below 0.1 % were left out, and stop the training; "
            "doctor says where they are"
        )
    table = {name: unpack_color(code) for name, code in zip(names, kept, strict=True)}
    shares = [colors[code] / total for code in kept]
    remarks.append(_describe_shares(names, [*table.values()], shares))
    if ignored:
        table[IGNORE_NAME] = unpack_color(_WHITE)
    return Found({"colors": table}, names, remarks, shares)


def _guess_ids(ids: Counter[int], classes: ClassList | None) -> Found:
    _refuse_smoothed(ids)
    values = sorted(ids)
    labels = [value for value in values if value != IGNORE_INDEX]
    if classes is not None and max(labels, default=0) < len(classes.names):
        shares = [ids[number] / ids.total() for number in range(len(classes.names))]
        remarks = [f"class names are those of {classes.path}"]
        return Found({}, [*classes.names], remarks, shares)
    if values in ([0, 255], [0, 1]):
        found = {"value_map": {255: 1}} if 255 in values else {}
        shares = [ids[value] / ids.total() for value in values]
        remarks = ["replace background and foreground by names"]
        return Found(found, ["background", "foreground"], remarks, shares)
    remarks = [_RENAME]
    if IGNORE_INDEX in values:
        remarks.append(f"255 ({ids[IGNORE_INDEX] / ids.total():.1%} of the pixels) is ignored")
    names = [f"class_{number}" for number in range(len(labels))]
    shares = [ids[value] / ids.total() for value in labels]
    remarks.append(_describe_shares(names, labels, shares))
    if labels == [*range(len(labels))]:
        return Found({}, names, remarks, shares)
    table = {value: number for number, value in enumerate(labels)}
    remarks.append("value_map leads raw values to class ids")
    return Found({"value_map": table}, names, remarks, shares)


def _describe_shares(names: Sequence[str], values: Sequence[Any], shares: Sequence[float]) -> str:
    """What every placeholder stands for, so that names can be put in their places."""
    triples = zip(names, values, shares, strict=True)
    return ", ".join(f"{name} is {value} ({share:.1%})" for name, value, share in triples)


def _refuse_smoothed(ids: Counter[int]) -> None:
    between = sum(count for value, count in ids.items() if 0 < value < 255)
    is_black_and_white = ids[0] and ids[255] and between < 0.5 * ids.total()
    if is_black_and_white and len(ids) > _MAX_CLASSES and max(ids) == 255:
        raise DataError(
            f"masks hold {len(ids) - 2} values between 0 and 255 ({between / ids.total():.1%} of "
            "the pixels), as smoothed or JPEG pictures do; save masks without smoothing, as PNG"
        )
