"""Colours for classes that come without."""

Color = tuple[int, int, int]
Palette = tuple[Color, ...]


def make_palette(n_colors: int) -> Palette:
    """Return PASCAL VOC's colour map: distinct colours from the bits of the class id.

    Bit 0, 1 and 2 of the id go to the highest free bit of red, green and blue, then bit 3, 4
    and 5 to the next lower one, and so on (VOC development kit, ``VOClabelcolormap.m``).

    Args:
        n_colors: Number of colours, at most 256.

    Returns:
        ``n_colors`` RGB triples, values 0..255; the first is black.

    >>> make_palette(4)
    ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    """
    return tuple(_color(index) for index in range(n_colors))


def _color(index: int) -> Color:
    red, green, blue = (
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for channel in range(3)
    )
    return red, green, blue
