"""A contact sheet of training samples: what the network sees, with the labels laid over it."""

from itertools import islice
from pathlib import Path

import numpy as np

from seglab.data.base import SegmentationDataModule
from seglab.data.dataset import Sample
from seglab.data.sources.source import Pixels
from seglab.visualize import as_rgb, color_table, overlay, save_picture

_GAP = 4
_ROW = 16  # height of a line of the legend


def browse(
    data: SegmentationDataModule,
    path: str | Path,
    *,
    n_samples: int = 12,
    columns: int = 4,
    side: int = 256,
) -> Path:
    """Write a contact sheet of the first training samples, augmented as in training.

    Each cell shows a sample and, below it, the same with its mask laid over; ignored pixels are
    white. A legend names every class; those that do not occur in the samples are in brackets.

    Args:
        data: The data module; `setup` is called.
        path: Picture file to write.
        n_samples: How many samples, in training order.
        columns: Cells in a row.
        side: Longest side of a cell in pixels; larger samples are shrunk.

    Returns:
        `path`.
    """
    data.setup("fit")
    keys = islice(iter(data.train_dataloader().sampler), n_samples)
    samples = [data.train_dataset[key] for key in keys]
    colors = color_table(data.palette, data.num_classes)
    sheet = _arrange([_cell(sample, colors, side) for sample in samples], columns)
    present = np.unique(np.concatenate([sample["mask"].numpy().ravel() for sample in samples]))
    names = [
        (name if label in present else f"({name})", colors[label])
        for label, name in enumerate(data.class_names)
    ]
    target = Path(path)
    save_picture(target, np.vstack([sheet, _legend(names, sheet.shape[1])]))
    return target


def _cell(sample: Sample, colors: Pixels, side: int) -> Pixels:
    """Image above overlay, (2 h + gap, w, 3)."""
    from seglab.data.transforms.resizing import fit_size, resize_image

    image = as_rgb(sample["image"].permute(1, 2, 0).numpy())
    labelled = overlay(image, sample["mask"].numpy(), colors)
    if max(image.shape) > side:
        shape = fit_size(image.shape[:2], (side, side))
        image, labelled = resize_image(image, shape), resize_image(labelled, shape)
    gap = np.full((_GAP, image.shape[1], 3), 255, np.uint8)
    return np.vstack([image, gap, labelled])


def _arrange(cells: list[Pixels], columns: int) -> Pixels:
    """Cells in rows on white, each in a field of the largest cell's size."""
    height = max(len(cell) for cell in cells) + 2 * _GAP
    width = max(cell.shape[1] for cell in cells) + _GAP
    rows = -(-len(cells) // columns)
    sheet = np.full((rows * height, min(columns, len(cells)) * width, 3), 255, np.uint8)
    for number, cell in enumerate(cells):
        top, left = (number // columns) * height, (number % columns) * width
        sheet[top : top + len(cell), left : left + cell.shape[1]] = cell
    return sheet


def _legend(names: list[tuple[str, Pixels]], width: int) -> Pixels:
    """A coloured square and a name for each class, in as many lines as needed."""
    from PIL import Image, ImageDraw

    places, left, line = [], 0, 0
    for name, color in names:
        needed = 2 * _ROW + 7 * len(name)
        if left and left + needed > width:
            left, line = 0, line + 1
        places.append((left, line * _ROW, name, color))
        left += needed
    picture = Image.new("RGB", (width, (line + 1) * _ROW), "white")
    draw = ImageDraw.Draw(picture)
    for left, top, name, color in places:
        fill = (int(color[0]), int(color[1]), int(color[2]))
        draw.rectangle((left + 2, top + 2, left + _ROW - 3, top + _ROW - 3), fill, "black")
        draw.text((left + _ROW + 2, top + 2), name, "black")
    return np.array(picture)
