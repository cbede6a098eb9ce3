"""What people have, what they type, what they get: one row per set, written as a tiny folder.

`PYTHONPATH=. python tests/everyday_sets.py` prints the table that docs/own_data.md shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
import yaml
from PIL import Image

Array = np.ndarray
HEIGHT, WIDTH = 24, 32
NAMES = ["a", "b", "c"]
COLORS = np.uint8([[128, 64, 128], [0, 0, 142], [9, 8, 7]])
TRAIN, VAL = ("v1_0", "v1_1", "v2_0", "v3_0"), ("v4_0", "v5_0")
ALL = TRAIN + VAL


def picture(name: str, bands: int = 3, top: int = 256, dtype: Any = np.uint8) -> Array:
    """Smooth random pixels of an image, (H, W, bands)."""
    rng = np.random.default_rng([*name.encode(), bands])
    small = rng.random((3, 4, bands)).astype(np.float32)
    large = cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    large = large.reshape(HEIGHT, WIDTH, bands)
    large[0, 0], large[0, 1] = 1.0, 0.0
    return (large * (top - 1 if top > 1 else 1)).astype(dtype)


def ids(name: str, n: int = 3) -> Array:
    """Class ids in upright boxes, (H, W); every class occurs."""
    rng = np.random.default_rng([*name.encode(), 99])
    found = np.zeros((HEIGHT, WIDTH), np.uint8)
    for label in range(1, n):
        left, upper = int(rng.integers(0, 10)), int(rng.integers(0, 8))
        found[upper : upper + 7, 15 * (label - 1) + left : 15 * (label - 1) + left + 5] = label
    return found


def home(root: Path, name: str) -> Path:
    return root / ("train" if name in TRAIN else "val")


def save(path: Path, array: Array, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, photometric="minisblack", **options)
    else:
        Image.fromarray(array).save(path, **options)


@dataclass(frozen=True)
class Row:
    """One everyday set.

    Attributes:
        have: What the user has.
        write: Writes it below a folder; returns image (H, W, C) in 0..255 and ids by stem.
        typed: Arguments of `FolderDataModule` beside root and classes, as YAML.
        doctor: What the doctor says before they are typed (regular expression); "" if it is sound.
        init: "right", "images differ" where a user must decide, or its refusal.
        n_classes: How many.
        atol: Allowed difference of pixels.
        prepare: Arguments of `prepare`, where the set needs it.
    """

    have: str
    write: Callable[[Path], dict[str, tuple[Array, Array]]]
    typed: str = ""
    doctor: str = ""
    init: str = "right"
    n_classes: int = 3
    atol: float = 1e-3
    prepare: str = ""

    def options(self, root: Path) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load("{" + self.typed.replace("ROOT", str(root)) + "}")
        return found


def masks_as(
    end: str, change: Callable[[Array], Array] = lambda x: x, n: int = 3, **options: Any
) -> Callable[[Path], dict[str, tuple[Array, Array]]]:
    """Plain images; masks of a kind."""

    def write(root: Path) -> dict[str, tuple[Array, Array]]:
        for name in ALL:
            save(home(root, name) / f"images/{name}.png", picture(name))
            save(home(root, name) / f"masks/{name}{end}", change(ids(name, n)), **options)
        return {name: (picture(name), ids(name, n)) for name in ALL}

    return write


def images_as(
    end: str,
    raw: Callable[[str], Array],
    expected: Callable[[Array], Array] = lambda x: x,
    **options: Any,
) -> Callable[[Path], dict[str, tuple[Array, Array]]]:
    """Images of a kind; plain masks."""

    def write(root: Path) -> dict[str, tuple[Array, Array]]:
        for name in ALL:
            save(home(root, name) / f"images/{name}{end}", raw(name), **options)
            save(home(root, name) / f"masks/{name}.png", ids(name))
        return {name: (expected(raw(name)), ids(name)) for name in ALL}

    return write


def laid_out(
    image: Callable[[str], str], mask: Callable[[str], str]
) -> Callable[[Path], dict[str, tuple[Array, Array]]]:
    """Plain images and masks at the paths that two functions of the stem give."""

    def write(root: Path) -> dict[str, tuple[Array, Array]]:
        for name in ALL:
            save(root / image(name), picture(name))
            save(root / mask(name), ids(name))
        return {name: (picture(name), ids(name)) for name in ALL}

    return write


def split(name: str) -> str:
    return "train" if name in TRAIN else "val"


def palette(path: Path) -> dict[str, tuple[Array, Array]]:
    expected = masks_as(".png")(path)
    for name in ALL:
        file = Image.fromarray(ids(name)).convert("P")
        file.putpalette(COLORS.ravel().tolist())
        file.putdata(ids(name).ravel().tolist())
        file.save(home(path, name) / f"masks/{name}.png")
    return expected


def ignored(root: Path) -> dict[str, tuple[Array, Array]]:
    expected = masks_as(".png")(root)
    for name, (_, labels) in expected.items():
        labels[-2:] = 255
        save(home(root, name) / f"masks/{name}.png", labels)
    return expected


def turned(root: Path) -> dict[str, tuple[Array, Array]]:
    """Photographs that are stored turned to the left; masks as viewers show them."""
    exif, expected = Image.Exif(), {}
    exif[0x0112] = 6
    for name in ALL:
        path = home(root, name) / f"images/{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = np.rot90(picture(name))
        Image.fromarray(stored).save(path, exif=exif, quality=100, subsampling=0)
        save(home(root, name) / f"masks/{name}.png", ids(name))
        expected[name] = np.rot90(np.array(Image.fromarray(stored)), -1), ids(name)
    return expected


def with_list(end: str, header: str, line: str) -> Callable[[Path], dict[str, tuple[Array, Array]]]:
    def write(root: Path) -> dict[str, tuple[Array, Array]]:
        expected = laid_out(lambda n: f"i/{n}.png", lambda n: f"m/{n}.png")(root)
        lines = [line.format(i=f"i/{n}.png", m=f"m/{n}.png", s=split(n)) for n in ALL]
        (root / f"files{end}").write_text("\n".join([header] * bool(header) + lines))
        return expected

    return write


def boxes(name: str) -> list[tuple[int, int, int, int, int]]:
    """(label, left, top, right, bottom) of the boxes, the last two excluded."""
    labels = ids(name)
    return [
        (n, int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)
        for n in (1, 2)
        for y, x in [np.nonzero(labels == n)]
    ]


def coco(root: Path) -> dict[str, tuple[Array, Array]]:
    content: dict[str, Any] = {"images": [], "annotations": []}
    for number, name in enumerate(ALL):
        save(root / f"images/{name}.png", picture(name))
        entry = {"id": number, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH}
        content["images"].append(entry)
        for label, *(left, top, right, bottom) in boxes(name):
            polygon = [left, top, right, top, right, bottom, left, bottom]
            content["annotations"].append(
                {"id": 9 * number + label, "image_id": number, "category_id": label}
                | {"segmentation": [polygon]}
            )
    content["categories"] = [{"id": 1, "name": "b"}, {"id": 2, "name": "c"}]
    (root / "instances.json").write_text(json.dumps(content))
    return {name: (picture(name), ids(name)) for name in ALL}


def labelme(root: Path) -> dict[str, tuple[Array, Array]]:
    for name in ALL:
        save(root / f"images/{name}.png", picture(name))
        shapes = [
            {"label": NAMES[label], "shape_type": "polygon"}
            | {"points": [[x, y], [r - 1, y], [r - 1, b - 1], [x, b - 1]]}
            for label, x, y, r, b in boxes(name)
        ]
        content = {"shapes": shapes, "imagePath": f"{name}.png"}
        size = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
        (root / f"images/{name}.json").write_text(json.dumps(content | size))
    return {name: (picture(name), ids(name)) for name in ALL}


def grey(image: Array) -> Array:
    return np.repeat(image.reshape(HEIGHT, WIDTH, 1), 3, axis=2)


def from_range(top: float) -> Callable[[Array], Array]:
    return lambda raw: raw.astype(np.float64) * 255 / top


def coded(mask: Array) -> Array:
    return COLORS[mask]


def with_alpha(image: Array, value: int | None = None) -> Array:
    alpha = np.full((HEIGHT, WIDTH), 255 if value is None else value, np.uint8)
    alpha[0, 0] = 255
    return np.dstack([image, alpha])


SIDE_BY_SIDE = "no folder .*other layouts: data.images"
MASKS = [
    Row("grey PNG of ids 0, 1, 2", masks_as(".png")),
    Row("palette PNG (VOC's kind)", palette),
    Row("ids and 255 for unlabelled pixels", ignored),
    Row(
        "black and white PNG, 0 and 255",
        masks_as(".png", lambda m: m * np.uint8(255), 2),
        "value_map: {255: 1}",
        r"never occur in the masks: b; 255 means ignored.*value_map: \{255: 1\}",
        n_classes=2,
    ),
    Row("1-bit PNG", masks_as(".png", lambda m: m.astype(bool), 2), n_classes=2),
    Row(
        "other ids: 0, 5, 9",
        masks_as(".png", lambda m: np.uint8([0, 5, 9])[m]),
        "value_map: {0: 0, 5: 1, 9: 2}",
        r"label value 9 in 4 mask.*data.value_map: \{5: 1, 9: 2\}",
    ),
    Row(
        "16-bit PNG of ids 7, 300, 24001",
        masks_as(".png", lambda m: np.uint16([7, 300, 24001])[m]),
        "value_map: {7: 0, 300: 1, 24001: 2}",
        r"value_map: \{7: 0, 300: 1, 24001: 2\}",
    ),
    Row(
        "RGB colour codes",
        masks_as(".png", coded),
        "colors: {a: [128, 64, 128], b: [0, 0, 142], c: [9, 8, 7]}",
        r"hold colours, not class ids(.|\n)*NAME: \[128, 64, 128\]",
    ),
    Row(
        "RGBA colour codes",
        masks_as(".png", lambda m: np.dstack([coded(m), np.full(m.shape, 255, np.uint8)])),
        "colors: {a: [128, 64, 128], b: [0, 0, 142], c: [9, 8, 7]}",
        r"hold colours, not class ids",
    ),
    Row(
        "black and white, saved as RGB",
        masks_as(".png", lambda m: np.repeat(m[..., None] * np.uint8(255), 3, 2), 2),
        "colors: {a: [0, 0, 0], b: [255, 255, 255]}",
        r"NAME: \[255, 255, 255\]",
        n_classes=2,
    ),
    Row("TIFF, 16 bits, compressed", masks_as(".tif", lambda m: m.astype("u2"), compression="lzw")),
    Row("NPY, int64", masks_as(".npy", lambda m: m.astype(np.int64))),
    Row("BMP", masks_as(".bmp")),
    Row(
        "COCO's JSON of polygons",
        coco,
        'images: "images/*", masks: "masks/{stem}", val_fraction: 0.4',
        SIDE_BY_SIDE,
        prepare="coco ROOT/instances.json --images ROOT/images --output ROOT/masks --background a",
    ),
    Row(
        "Labelme's JSON files",
        labelme,
        'images: "images/*", masks: "masks/{stem}", val_fraction: 0.4',
        SIDE_BY_SIDE,
        prepare="labelme ROOT/images --output ROOT/masks --background a",
    ),
]
IMAGES = [
    Row("JPEG photographs turned by EXIF", turned, atol=4),
    Row("grey, 8 bits", images_as(".png", lambda n: picture(n, 1)[..., 0], grey)),
    Row(
        "grey, 8 bits, kept as one band",
        images_as(".png", lambda n: picture(n, 1)[..., 0], lambda i: i[..., None]),
        "channels: 1",
        init="images differ",
    ),
    Row(
        "grey, 16 bits",
        images_as(
            ".png",
            lambda n: picture(n, 1, 65536, np.uint16)[..., 0],
            lambda raw: grey(from_range(65535)(raw)),
        ),
        "value_range: [0, 65535]",
        r"holds uint16 values .*data.value_range: \[0, 65535\]",
    ),
    Row(
        "4 bands of 12 in 16 bits, TIFF, tiled and compressed",
        images_as(
            ".tif",
            lambda n: picture(n, 4, 4096, np.uint16),
            from_range(4095),
            planarconfig="contig",
            compression="zlib",
            tile=(16, 16),
        ),
        "channels: 4, value_range: [0, 4095]",
        r"has 4 band\(s\), data.channels is 3; set data.channels: 4",
    ),
    Row(
        "6 bands of fractions, NPY",
        images_as(".npy", lambda n: picture(n, 6, 1, np.float32), from_range(1)),
        "channels: 6, value_range: [0, 1]",
        r"set data.channels: 6",
    ),
    Row(
        "2 bands, 8 bits, NPY",
        images_as(".npy", lambda n: picture(n, 2)),
        "channels: 2",
        r"set data.channels: 2",
    ),
    Row(
        "transparent PNG",
        images_as(".png", lambda n: with_alpha(picture(n), 200), lambda i: i[..., :3]),
        "drop_alpha: true",
        "a fourth band that is not opaque everywhere; set data.channels: 4 .*drop_alpha",
        init="images differ",
    ),
    Row("opaque RGBA", images_as(".png", lambda n: with_alpha(picture(n)), lambda i: i[..., :3])),
    Row(
        "RGB TIFF of planes",
        images_as(
            ".tif",
            lambda n: np.ascontiguousarray(np.moveaxis(picture(n), 2, 0)),
            lambda raw: np.moveaxis(raw, 0, 2),
            planarconfig="separate",
        ),
    ),
    Row("WebP, lossless", images_as(".webp", picture, lossless=True)),
]
DIVIDED = "val_fraction: 0.4"
LAYOUTS = [
    Row(
        "`a/17_img.png` beside `a/17_label.png`",
        laid_out(lambda n: f"{n[:2]}/{n}_img.png", lambda n: f"{n[:2]}/{n}_label.png"),
        f'images: "**/*_img.png", masks: "{{stem}}_label.png", {DIVIDED}',
        SIDE_BY_SIDE,
    ),
    Row(
        "`17.png` beside `17_mask.png`",
        laid_out(lambda n: f"{n}.png", lambda n: f"{n}_mask.png"),
        f'images: "*", masks: "{{stem}}_mask", {DIVIDED}',
        SIDE_BY_SIDE,
    ),
    Row(
        "`images/CITY/17.png`, `labels/CITY/17.png`",
        laid_out(lambda n: f"images/{n[:2]}/{n}.png", lambda n: f"labels/{n[:2]}/{n}.png"),
        f'images: "images/**/*", masks: "labels/{{subfolder}}/{{stem}}", {DIVIDED}',
        SIDE_BY_SIDE,
    ),
    Row(
        "`images/train/17.png`, `gt/train/17.png`",
        laid_out(lambda n: f"images/{split(n)}/{n}.png", lambda n: f"gt/{split(n)}/{n}.png"),
        'images: "images/{split}/*", masks: "gt/{split}/{stem}"',
        SIDE_BY_SIDE,
    ),
    Row(
        "`train/17.png`, `train_labels/17_L.png` (CamVid's)",
        laid_out(lambda n: f"{split(n)}/{n}.png", lambda n: f"{split(n)}_labels/{n}_L.png"),
        'images: "{split}/*", masks: "{split}_labels/{stem}_L"',
        SIDE_BY_SIDE,
    ),
    Row(
        "`valid` in the place of `val`",
        laid_out(
            lambda n: f"{split(n).replace('val', 'valid')}/images/{n}.png",
            lambda n: f"{split(n).replace('val', 'valid')}/masks/{n}.png",
        ),
        "val_split: valid",
        "val: no folder .*holds train/, valid/",
    ),
    Row(
        "a CSV list image,mask,split",
        with_list(".csv", "image,mask,split", "{i},{m},{s}"),
        "list: ROOT/files.csv",
        SIDE_BY_SIDE,
    ),
    Row(
        "a text list of image and mask",
        with_list(".txt", "", "{i} {m}"),
        f"list: ROOT/files.txt, {DIVIDED}",
        SIDE_BY_SIDE,
    ),
    Row(
        "no validation images, 3 folds",
        laid_out(lambda n: f"images/{n}.png", lambda n: f"masks/{n}.png"),
        'images: "images/*", masks: "masks/{stem}", folds: 3, fold: 1',
        SIDE_BY_SIDE,
    ),
    Row(
        "frames of videos `v1_0`, `v1_1`, ...",
        laid_out(lambda n: f"images/{n}.png", lambda n: f"masks/{n}.png"),
        f'images: "images/*", masks: "masks/{{stem}}", {DIVIDED}, group: "^[^_]+"',
        SIDE_BY_SIDE,
    ),
]
ROWS = [*MASKS, *IMAGES, *LAYOUTS]


def table() -> str:
    """The rows as Markdown."""
    lines = ["| what I have | what I type | what I get |", "|---|---|---|"]
    for row in ROWS:
        bands = row.options(Path("root")).get("channels", 3)
        kind = "float32" if "value_range" in row.typed else "uint8"
        typed = [f"`prepare {row.prepare}`"] if row.prepare else []
        typed += [f"`{row.typed}`"] if row.typed else []
        right = {"right": "", "images differ": "; `init` takes all bands for data"}[row.init]
        if row.typed == "channels: 1":
            right = "; `init` writes 3 equal bands"
        get = f"images {kind} of {bands} band(s), {row.n_classes} classes{right}"
        lines.append(f"| {row.have} | {', then '.join(typed) or 'nothing'} | {get} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
