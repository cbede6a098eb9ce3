"""Where validation images come from: folders beside `train`, or a share of all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seglab.data.errors import DataError
from seglab.data.inspection.known_layouts import try_pairs
from seglab.data.inspection.stock import VAL_NAMES
from seglab.data.sources.division import Division
from seglab.data.sources.files import Item

FRACTIONS = (0.2, 0.25, 0.3, 0.4, 0.5, 0.1, 0.6, 0.7)


def guess_splits(
    root: Path, layout: dict[str, str], items: Sequence[Item]
) -> tuple[dict[str, Any], list[Item], list[str]]:
    """Where validation images come from: a folder beside `train`, or a share of all."""
    images, masks = layout["images"], layout["masks"]
    if "{split}" not in images:
        return guess_fraction(items)
    place = root / images.split("{split}")[0]
    for name in (name for name in VAL_NAMES if (place / name).is_dir()):
        found = try_pairs(root, images, masks, name)
        if isinstance(found, list):
            remark = "no val: the images of test are used for validation"
            return (
                {} if name == "val" else {"val_split": name},
                found,
                [remark] if name == "test" else [],
            )
        if name != "test":  # test images often have no masks
            raise found or DataError(f"{place / name} holds no images where train has them")
    layout["images"], layout["masks"] = (
        text.replace("{split}", "train") for text in (images, masks)
    )
    return guess_fraction(items)


def guess_fraction(items: Sequence[Item]) -> tuple[dict[str, Any], list[Item], list[str]]:
    """Return a share that leaves images for training and validation, no pairs, and a remark."""
    for fraction in FRACTIONS:
        try:
            chosen = Division(fraction).choose(items, "val")
            Division(fraction).choose(items, "train")
        except DataError:
            continue
        remark = (
            f"no validation images: {len(chosen)} of {len(items)} are taken, by their names; if "
            "images are frames of videos, keep each video on one side: group"
        )
        return {"val_fraction": fraction}, [], [remark]
    raise DataError(f"{len(items)} pair(s) cannot be divided into training and validation")
