"""Generated scenes: an endless, seeded data set that needs multi-level fusion, and no download.

The recipe of a scene (size 96 by default; all lengths grow with it):

1. *Ground* (class 0): green or sandy, two fractal-noise textures split by a random line. Light
   and tint vary from scene to scene, so no class has a colour of its own.
2. *Lakes* (1) and *oases* (2): blue blobs, pixel for pixel the same texture. A blob on green is
   a lake, one on sand an oasis: only what lies around it tells (radius 1/10 .. 1/4 of the side).
3. *Gates* (3) and *doors* (4): grey slabs of one look, near one side of the picture. They are
   gates if the beacon at the *opposite* side is yellow and doors if it is violet: far context.
4. *Beacon* (5): a disc of either colour; one class, so its colour is a clue and no label.
5. *Fine* (6) and *coarse* (7) weaves: stripes one and two pixels wide at any angle, equal in mean
   colour and contrast, from 1/16 to 1/4 of the side: only full-resolution detail tells.

Outlines (one pixel) and one random patch per scene are 255. Later objects lie over earlier ones.
"""

import functools
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from seglab.bounds import check_bounds
from seglab.data.base import SegmentationDataModule
from seglab.data.sources.source import IGNORE_INDEX, Pixels, Shapes, Source

CLASS_NAMES = ("ground", "lake", "oasis", "gate", "door", "beacon", "fine", "coarse")
PALETTE = (
    (120, 120, 80),
    (30, 90, 220),
    (40, 220, 220),
    (200, 60, 60),
    (250, 160, 60),
    (240, 240, 60),
    (170, 60, 200),
    (70, 180, 70),
)
GROUND, LAKE, OASIS, GATE, DOOR, BEACON, FINE, COARSE = range(8)
Image = NDArray[np.float32]
Region = NDArray[np.bool_]
_BANK = 512  # side of the texture images that scenes cut windows from


class Scenes(Source):
    """Scenes 0, 1, 2, ... of a seed; epoch e shows scenes ``e * length + index``.

    Args:
        length: Scenes per epoch.
        size: Height and width in pixels, at least 32.
        seed: Scenes of different seeds have nothing in common.
        endless: New scenes every epoch; False shows the same ones again.

    Raises:
        ValueError: If `size` is below 32.

    >>> image, mask = Scenes(length=10, size=64).read(3)
    >>> image.shape, mask.shape, image.dtype == mask.dtype == np.uint8
    ((64, 64, 3), (64, 64), True)
    """

    def __init__(
        self, length: int, size: int = 96, seed: int = 0, *, endless: bool = False
    ) -> None:
        if size < 32:
            raise ValueError(f"scenes of {size} pixels cannot show their objects; use >= 32")
        self.length, self.size, self.seed, self.endless = length, size, seed, endless

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """Name by number."""
        return f"scene_{index:05d}"

    def shapes(self, index: int) -> Shapes:
        """All scenes have one shape."""
        return Shapes((self.size, self.size), (self.size, self.size))

    def read(self, index: int, epoch: int = 0) -> tuple[Pixels, Pixels]:
        """Draw scene number ``epoch * length + index`` (or ``index``, if not endless)."""
        number = epoch * self.length + index if self.endless else index
        return draw_scene(np.random.default_rng([self.seed, number]), self.size)


class ScenesDataModule(SegmentationDataModule):
    """Generated scenes, see the module's text for the recipe.

    Training never shows a scene twice; validation and test are fixed, the same for every seed.

    Args:
        root: Not used; there for the common signature.
        size: Height and width of a scene in pixels.
        train_length: Training scenes per epoch.
        val_length: Validation scenes; as many test scenes.
        options: As in `SegmentationDataModule`.

    >>> data = ScenesDataModule(size=64, train_length=8, val_length=4, num_workers=0, batch_size=2)
    >>> data.setup("fit")
    >>> next(iter(data.train_dataloader()))["image"].shape
    torch.Size([2, 3, 64, 64])
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        size: int = 96,
        train_length: int = 800,
        val_length: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(CLASS_NAMES, PALETTE, **options)
        check_bounds(data__size=size, data__train_length=train_length, data__val_length=val_length)
        self.size = size
        self.lengths = {"train": train_length, "val": val_length, "test": val_length}

    def make_source(self, split: str) -> Source:
        """Return scenes of the split's own seed; only the training scenes follow the run's."""
        seed = 3 * self.seed if split == "train" else ("val", "test").index(split) + 1
        return Scenes(self.lengths[split], self.size, seed, endless=split == "train")


class Canvas(NamedTuple):
    """What the painters draw on: image float32 (H, W, 3), mask uint8 (H, W)."""

    image: Image
    mask: Pixels


def draw_scene(rng: np.random.Generator, size: int) -> tuple[Pixels, Pixels]:
    """Draw one scene: image (size, size, 3) RGB and mask (size, size), both uint8."""
    sand = _half_plane(rng, size)
    canvas = Canvas(_ground(rng, size, sand), np.zeros((size, size), np.uint8))
    for _ in range(rng.integers(1, 4)):
        _paint_water(rng, canvas, sand)
    for _ in range(rng.integers(4, 10)):
        _paint_weave(rng, canvas)
    _paint_gates(rng, canvas)
    _paint_void(rng, canvas)
    light = rng.uniform(0.75, 1.2) * rng.uniform(0.9, 1.1, 3)
    noise = _window(rng, "grain", size)[..., None]
    image = canvas.image * light.astype(np.float32) + 10 * noise
    return np.clip(image, 0, 255).astype(np.uint8), canvas.mask


def _half_plane(rng: np.random.Generator, size: int) -> Region:
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.25, 0.25) * size
    rows, columns = np.ogrid[:size, :size]
    half = size / 2
    side = np.cos(angle) * (rows - half) + np.sin(angle) * (columns - half)
    wavy: Region = side + 0.06 * size * _window(rng, "cloud", size) > offset
    return wavy


def _ground(rng: np.random.Generator, size: int, sand: Region) -> Image:
    green = np.array([95, 125, 60], np.float32) + 22 * _window(rng, "cloud", size)[..., None]
    sandy = np.array([165, 140, 95], np.float32) + 14 * _window(rng, "grain", size)[..., None]
    return cast(Image, np.where(sand[..., None], sandy, green))


def _paint_water(rng: np.random.Generator, canvas: Canvas, sand: Region) -> None:
    size = len(sand)
    row, column = rng.uniform(0.1, 0.9, 2) * size
    on_sand = sand[int(row), int(column)]
    blob = _blob(rng, size, row, column, size * rng.uniform(0.1, 0.25)) & (sand == on_sand)
    texture = np.array([60, 95, 165], np.float32) + 16 * _window(rng, "cloud", size)[..., None]
    _paint(canvas, blob, OASIS if on_sand else LAKE, texture)


def _paint_weave(rng: np.random.Generator, canvas: Canvas) -> None:
    size = len(canvas.mask)
    label = FINE if rng.random() < 0.5 else COARSE
    row, column = rng.uniform(0.05, 0.95, 2) * size
    radius = size / 32 * 6 ** rng.random() ** 1.5
    blob = _blob(rng, size, row, column, radius)
    _paint(canvas, blob, label, _stripes(rng, size, 1 if label == FINE else 2))


def _paint_gates(rng: np.random.Generator, canvas: Canvas) -> None:
    size = len(canvas.mask)
    yellow, flipped = rng.random(2) < 0.5
    beacon_at = np.array([rng.uniform(0.12, 0.88), rng.uniform(0.1, 0.18)])
    if flipped:
        beacon_at[1] = 1 - beacon_at[1]
    color = np.array([225, 200, 60] if yellow else [165, 70, 190], np.float32)
    beacon = _ellipse(size, *(beacon_at * size), *(size * rng.uniform(0.08, 0.12, 2)))
    for _ in range(rng.integers(1, 3)):
        column = rng.uniform(0.62, 0.88)
        row, column = rng.uniform(0.15, 0.85), 1 - column if flipped else column
        slab = _slab(rng, size, row * size, column * size)
        texture = (
            np.array([125, 120, 118], np.float32) + 12 * _window(rng, "grain", size)[..., None]
        )
        _paint(canvas, slab, GATE if yellow else DOOR, texture)
    _paint(canvas, beacon, BEACON, np.broadcast_to(color, canvas.image.shape))


def _paint_void(rng: np.random.Generator, canvas: Canvas) -> None:
    size = len(canvas.mask)
    height, width = rng.integers(size // 16, size // 5, 2)
    top, left = rng.integers(0, size - height), rng.integers(0, size - width)
    canvas.mask[top : top + height, left : left + width] = IGNORE_INDEX


def _paint(canvas: Canvas, shape: Region, label: int, texture: Image) -> None:
    import cv2

    np.copyto(canvas.image, texture, where=shape[..., None])
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inside = shape.astype(np.uint8)
    outline = cv2.dilate(inside, cross) > cv2.erode(inside, cross)
    canvas.mask[shape] = label
    canvas.mask[outline] = IGNORE_INDEX


def _blob(rng: np.random.Generator, size: int, row: float, column: float, radius: float) -> Region:
    """A wobbly disc: the radius follows a few random harmonics of the angle."""
    import cv2

    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    phases, weights = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0, 0.18, 3)
    waves = np.cos(angles[:, None] * np.array([2, 3, 5]) + phases) @ weights
    radii = radius * (1 + waves)
    points = np.stack([column + radii * np.cos(angles), row + radii * np.sin(angles)], 1)
    canvas = np.zeros((size, size), np.uint8)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1)
    return canvas.astype(np.bool_)


def _slab(rng: np.random.Generator, size: int, row: float, column: float) -> Region:
    height, width = size * rng.uniform(0.12, 0.25), size * rng.uniform(0.07, 0.13)
    rows, columns = np.ogrid[:size, :size]
    inside: Region = (abs(rows - row) < height) & (abs(columns - column) < width)
    return inside


def _ellipse(size: int, row: float, column: float, height: float, width: float) -> Region:
    rows, columns = np.ogrid[:size, :size]
    inside: Region = ((rows - row) / height) ** 2 + ((columns - column) / width) ** 2 < 1
    return inside


def _stripes(rng: np.random.Generator, size: int, width: int) -> Image:
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    rows, columns = np.ogrid[:size, :size]
    along = np.cos(angle) * rows + np.sin(angle) * columns
    wave = np.sin(np.pi / width * along + phase)
    return cast(Image, (np.array([150, 105, 95]) + 45 * wave[..., None]).astype(np.float32))


def _window(rng: np.random.Generator, kind: str, size: int) -> Image:
    """A random window of a texture with mean 0 and standard deviation 1, (size, size)."""
    bank = _texture_bank(kind)
    row, column = rng.integers(0, max(1, _BANK - size + 1), 2)
    window = bank[row : row + size, column : column + size]
    return window if len(window) == size else np.resize(window, (size, size))


@functools.cache
def _texture_bank(kind: str) -> Image:
    import cv2

    rng = np.random.default_rng(0)
    octaves = {"cloud": (32, 16, 8), "grain": (3, 1)}[kind]
    noise = np.zeros((_BANK, _BANK), np.float32)
    for pitch in octaves:
        coarse = rng.standard_normal((_BANK // pitch + 2,) * 2).astype(np.float32)
        noise += cv2.resize(coarse, (_BANK, _BANK), interpolation=cv2.INTER_CUBIC)
    return cast(Image, (noise - noise.mean()) / noise.std())
