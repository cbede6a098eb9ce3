"""Figures as people read them."""

from __future__ import annotations

import base64
import io
from math import isfinite
from pathlib import Path

from seglab.reporting.pages.run_files import Interval

_DASH = "\N{EN DASH}"


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction in percent, a dash for none.

    >>> percent(0.12345), percent(None)
    ('12.35', '–')
    """
    return _DASH if value is None or not isfinite(value) else f"{100 * value:.{digits}f}"


def ends(interval: Interval | None, digits: int = 1, unit: float = 100) -> str:
    """The ends of an interval in percent, or another unit; empty where there is none.

    >>> ends(Interval(0.5, 0.4, 0.6)), ends(Interval(0.5, 0.4, 0.6), digits=2, unit=1)
    ('40.0 to 60.0', '0.40 to 0.60')
    """
    if interval is None or not (isfinite(interval.low) and isfinite(interval.high)):
        return ""
    return f"{unit * interval.low:.{digits}f} to {unit * interval.high:.{digits}f}"


def difference(interval: Interval) -> str:
    """A difference of two fractions in points, with its sign.

    >>> difference(Interval(-0.012, -0.02, 0.0))
    '−1.20'
    """
    if not isfinite(interval.value):
        return _DASH
    sign = "+" if interval.value >= 0 else "\N{MINUS SIGN}"
    return f"{sign}{abs(100 * interval.value):.2f}"


def signed_ends(interval: Interval) -> str:
    """The ends of the interval of a difference, in points; empty where there is none."""
    if not (isfinite(interval.low) and isfinite(interval.high)):
        return ""
    low, high = (f"{100 * end:+.2f}".replace("-", "\N{MINUS SIGN}") for end in interval[1:])
    return f"{low} to {high}"


def is_clear(interval: Interval) -> bool:
    """Whether an interval of a difference leaves out zero."""
    return interval.low > 0 or interval.high < 0


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3725), duration(59.6), duration(2.345)
    ('1 h 2 min', '1 min 0 s', '2.3 s')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def size(n_bytes: float) -> str:
    """Bytes in GiB or MiB.

    >>> size(3 * 2**30), size(5 * 2**20)
    ('3.00 GiB', '5 MiB')
    """
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def inline_picture(path: Path, longest: int = 1600) -> dict[str, str | int] | None:
    """A picture file as a data URI with its width and height; None if it is not there."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    picture.thumbnail((longest, 4 * longest))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    return {
        "uri": f"data:image/webp;base64,{data}", "width": picture.width, "height": picture.height,
    }  # fmt: skip
