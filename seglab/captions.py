"""Words on pictures: a caption above each row, and a legend of the classes that are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seglab.visualize import Pixels, grid

_FONT, _LINE, _MARGIN = 13, 20, 6  # height of letters and of a line, space around them, pixels
_MOST_CLASSES = 60  # of a legend
_TEXT, _PAPER = (30, 30, 30), (255, 255, 255)


class Sample(NamedTuple):
    """An evaluated image.

    Attributes:
        name: Of the image.
        image: uint8 RGB (H, W, 3).
        label: Class ids, uint8 (h, w).
        prediction: Class ids, uint8 (h, w).
        score: mIoU of this image alone, as a fraction; NaN if it has no labels.
    """

    name: str
    image: Pixels
    label: Pixels
    prediction: Pixels
    score: float

    @property
    def row(self) -> tuple[Pixels, Pixels, Pixels]:
        """What `grid` takes."""
        return self.image, self.label, self.prediction


def captioned_grid(
    samples: Sequence[Sample],
    colors: Pixels,
    class_names: Sequence[str],
    side: int = 256,
    title: str = "image, label, prediction",
) -> Pixels:
    """Put samples below one another, each with its name and score, and a legend under all.

    Args:
        samples: At least one.
        colors: uint8 (256, 3), see `seglab.visualize.color_table`.
        class_names: Of the ids 0..K-1.
        side: Longest side of a cell in pixels.
        title: First line.

    Returns:
        uint8 RGB.

    >>> blank = np.zeros((4, 8), np.uint8)
    >>> sample = Sample("street", np.zeros((4, 8, 3), np.uint8), blank, blank, 0.5)
    >>> captioned_grid([sample], np.zeros((256, 3), np.uint8), ["road"], side=64).shape
    (98, 200, 3)
    """
    strips = [grid([sample.row], colors, side) for sample in samples]
    width = max(strip.shape[1] for strip in strips)
    parts = [text_line(title, width)]
    for sample, strip in zip(samples, strips, strict=True):
        missing = width - strip.shape[1]
        filled = np.pad(strip, ((0, 0), (0, missing), (0, 0)), constant_values=255)
        parts += [text_line(describe(sample), width), filled]
    shown = np.unique([id_ for s in samples for m in s.row[1:] for id_ in np.unique(m)])
    return np.concatenate([*parts, legend(shown, colors, class_names, width)])


def describe(sample: Sample) -> str:
    """Name and score of a sample."""
    score = "no labels" if np.isnan(sample.score) else f"mIoU {100 * sample.score:.1f} %"
    return f"{sample.name}: {score}"


def text_line(text: str, width: int) -> Pixels:
    """One line of text, dark on white, cut with an ellipsis where it is too long."""
    picture, draw, font = _paper(width, _LINE)
    while len(text) > 1 and draw.textlength(text, font) > width - _MARGIN:
        text = text[:-2] + "…"
    draw.text((2, _LINE // 2), text, _TEXT, font, anchor="lm")
    return np.asarray(picture)


def legend(ids: NDArray[Any], colors: Pixels, class_names: Sequence[str], width: int) -> Pixels:
    """Name the colours of some class ids, in as many lines as it takes.

    Args:
        ids: Class ids; those that are no class are named "not labelled".
        colors: uint8 (256, 3).
        class_names: Of the ids 0..K-1.
        width: Pixels.

    Returns:
        uint8 RGB (lines, width, 3).
    """
    known = [int(id_) for id_ in ids if id_ < len(class_names)]
    entries = [(class_names[id_], tuple(colors[id_].tolist())) for id_ in known[:_MOST_CLASSES]]
    if len(known) > _MOST_CLASSES:
        entries.append((f"and {len(known) - _MOST_CLASSES} more", _PAPER))
    if len(known) < len(ids):
        entries.append(("not labelled", tuple(colors[255].tolist())))
    places, n_lines = _places([name for name, _ in entries], width)
    picture, draw, font = _paper(width, n_lines * _LINE + _MARGIN)
    for (name, color), (x, y) in zip(entries, places, strict=True):
        draw.rectangle((x, y + 4, x + 12, y + 16), color, outline=(120, 120, 120))
        draw.text((x + 17, y + _LINE // 2), name, _TEXT, font, anchor="lm")
    return np.asarray(picture)


def _places(names: Sequence[str], width: int) -> tuple[list[tuple[int, int]], int]:
    """Upper left corner of each entry, and the number of lines."""
    _, draw, font = _paper(1, 1)
    x, line, places = 2, 0, []
    for name in names:
        long = round(draw.textlength(name, font)) + 17 + 2 * _MARGIN
        if x > 2 and x + long > width:
            x, line = 2, line + 1
        places.append((x, line * _LINE + _MARGIN // 2))
        x += long
    return places, line + 1


def _paper(width: int, height: int) -> tuple[Any, Any, Any]:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (width, height), _PAPER)
    return picture, ImageDraw.Draw(picture), ImageFont.load_default(_FONT)
