"""Masks traced into polygons and drawn again by `prepare`: how near they come. One table.

    python benchmarks/polygons.py --root /path/to/camvid [--split val]

Every connected region of a mask becomes one polygon of cv2.findContours, without its holes: what
lies in a hole is a region of its own and drawn above. COCO's are traced along the outer edges of
the pixels, since pycocotools takes the pixels that a polygon covers; Labelme's through the centres
of border pixels, since its own converter draws borders too; there, a region of one or two pixels
has no polygon. IoU is that of the new masks with the old ones, over all pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from seglab.cli import main

FINE = 4  # enlargement before COCO's polygons are traced
NAMES = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
    *("pedestrian", "bicyclist", "ignore"),
)  # by the ids in the files; 11 is unlabelled


def trace(mask: Any, fineness: int = 1) -> list[tuple[str, Any, float]]:
    """Name, corners (N, 2) and area of every region, the largest first.

    Contours pass through the centres of border pixels; those of an enlarged mask are nearer to
    the pixels' outer edges.
    """
    found = []
    mask = mask.repeat(fineness, 0).repeat(fineness, 1)
    for label in np.unique(mask):
        inside = (mask == label).astype(np.uint8)
        lines, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        corners = [line[:, 0, :] for line in lines if len(line) > 2]
        found += [(NAMES[label], line, cv2.contourArea(line)) for line in corners]
    return sorted(found, key=lambda region: -region[2])


def write_labelme(folder: Path, name: str, regions: Any, size: tuple[int, int]) -> None:
    """One JSON file as Labelme writes it."""
    special = {"ignore": "__ignore__"}
    shapes = [
        {"label": special.get(label, label), "points": line.tolist(), "shape_type": "polygon"}
        for label, line, _ in regions
    ]
    content = {"shapes": shapes, "imagePath": f"{name}.jpg", "imageData": None}
    content |= {"imageHeight": size[0], "imageWidth": size[1]}
    (folder / f"{name}.json").write_text(json.dumps(content))


def write_coco(path: Path, pictures: dict[str, Any], size: tuple[int, int]) -> None:
    """One JSON file of all images, as COCO's."""
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
    for number, (name, regions) in enumerate(pictures.items()):
        entry = {"id": number, "file_name": f"{name}.jpg", "height": size[0], "width": size[1]}
        content["images"].append(entry)
        for label, line, _ in regions:
            region = {"id": len(content["annotations"]), "image_id": number}
            region |= {"category_id": NAMES.index(label) + 1, "iscrowd": 0}
            content["annotations"].append(
                {**region, "segmentation": [((line + 0.5) / FINE).ravel().tolist()]}
            )
    path.write_text(json.dumps(content))


def compare(old: dict[str, Any], folder: Path) -> tuple[float, float, float]:
    """Mean and smallest IoU of the classes, and the share of equal pixels, in percent."""
    counts = np.zeros((len(NAMES), len(NAMES)), np.int64)
    for name, mask in old.items():
        with Image.open(folder / f"{name}.png") as file:
            new = np.array(file)
        new[new == 255] = NAMES.index("ignore")
        pairs = mask.astype(np.int64) * len(NAMES) + new
        counts += np.bincount(pairs.ravel(), minlength=counts.size).reshape(counts.shape)
    both = counts.diagonal()
    iou = (both / (counts.sum(0) + counts.sum(1) - both))[:-1]
    return 100 * iou.mean(), 100 * iou.min(), 100 * both.sum() / counts.sum()


def run(root: Path, split: str, folder: Path) -> None:
    """Trace, prepare, compare; print a row for each kind."""
    images, old, fine, coarse = folder / "images", {}, {}, {}
    images.mkdir()
    for path in sorted((root / split / "masks").glob("*.png")):
        with Image.open(path) as file:
            old[path.stem] = np.array(file)
        (images / f"{path.stem}.jpg").symlink_to(root / split / "images" / f"{path.stem}.jpg")
        fine[path.stem] = trace(old[path.stem], FINE)
        coarse[path.stem] = trace(old[path.stem])
        write_labelme(images, path.stem, coarse[path.stem], old[path.stem].shape)
    write_coco(folder / "instances.json", fine, next(iter(old.values())).shape)
    sources = {"coco": [folder / "instances.json", "--images", images], "labelme": [images]}
    n_regions = {"coco": sum(map(len, fine.values())), "labelme": sum(map(len, coarse.values()))}
    print("| polygons | images | regions | mean IoU | worst class | equal pixels |")
    print("|---|--:|--:|--:|--:|--:|")
    for kind, source in sources.items():
        output = folder / kind
        typed = ["prepare", kind, *source, "--output", output, "--background", "ignore"]
        with contextlib.redirect_stdout(io.StringIO()):
            main([*map(str, typed), "--classes", ",".join(NAMES[:-1])])
        cells = [f"{value:.2f}" for value in compare(old, output)]
        print(f"| {kind} | {len(old)} | {n_regions[kind]} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--split", default="val")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run(arguments.root.absolute(), arguments.split, Path(place))
