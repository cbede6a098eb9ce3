"""Polygons become the masks that pycocotools, PIL and a ruler say, or nothing is written."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from seglab.data import DataError, FolderDataModule
from seglab.data.sources.coco import read_coco
from seglab.data.sources.drawing import Conversion, draw_masks
from seglab.data.sources.labelme import read_labelme
from seglab.data.sources.masks import read_mask

HEIGHT, WIDTH = 20, 30
RNG = np.random.default_rng(0)


def save_images(folder: Path, *names: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "grey").save(folder / name)


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(number: int, category: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    own = {"id": number, "image_id": 1, "category_id": category, "segmentation": segmentation}
    return own | more


def coco(*annotations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": list(annotations),
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    } | changes


def convert(root: Path, content: Any, **options: Any) -> Conversion:
    (root / "a.json").write_text(json.dumps(content))
    pictures, names = read_coco(root / "a.json", root / "images")
    names = options.pop("class_names", names)
    return draw_masks(pictures, root / "masks", names, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save_images(tmp_path / "images", "a.jpg")
    return tmp_path


def mask_of(root: Path, name: str = "a.png") -> np.ndarray:
    return read_mask(root / "masks" / name)


def test_boxes_are_drawn_to_the_pixel(root: Path) -> None:
    done = convert(root, coco(annotation(1, 7, [box(2, 3, 9, 8), box(20, 10, 30, 20)])))
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)  # cat is 1, dog 2: categories by id
    expected[3:8, 2:9] = 2
    expected[10:20, 20:30] = 2
    assert (mask_of(root) == expected).all()
    assert done == Conversion(("background", "cat", "dog"), 1, 1, 0, 0, 0)
    assert (root / "masks/classes.txt").read_text() == "background\ncat\ndog\n"


def test_smaller_regions_lie_above_larger_ones(root: Path) -> None:
    small, large = annotation(1, 3, [box(5, 5, 8, 8)]), annotation(2, 7, [box(0, 0, 30, 20)])
    convert(root, coco(small, large))
    expected = np.full((HEIGHT, WIDTH), 2, np.uint8)
    expected[5:8, 5:8] = 1
    assert (mask_of(root) == expected).all()


def test_crowds_of_run_lengths_are_drawn(root: Path) -> None:
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[4:9, 6] = inside[0:3, 7] = True
    counts, value = [], False  # runs of columns, beginning with zeros
    for pixel in inside.T.ravel().tolist():
        if pixel != value or not counts:
            counts += [0] * (pixel and not counts) + [0]
            value = pixel
        counts[-1] += 1
    crowd = annotation(1, 3, {"size": [HEIGHT, WIDTH], "counts": counts}, iscrowd=1)
    convert(root, coco(crowd))
    assert (mask_of(root) == inside).all()


@pytest.mark.filterwarnings("ignore")
def test_random_polygons_agree_with_pycocotools(root: Path) -> None:
    from pycocotools import mask as coder
    from pycocotools.coco import COCO

    polygons = [(RNG.random((6, 2)) * [WIDTH, HEIGHT]).ravel().tolist() for _ in range(12)]
    annotations = [annotation(n, 7 if n % 2 else 3, [p]) for n, p in enumerate(polygons, 1)]
    packed = coder.encode(np.asfortranarray(RNG.random((HEIGHT, WIDTH)) > 0.5, np.uint8))
    packed["counts"] = packed["counts"].decode()
    annotations.append(annotation(13, 3, packed))
    convert(root, coco(*annotations))
    reader = COCO(str(root / "a.json"))
    parts = [(reader.annToMask(a).astype(bool), a["category_id"]) for a in annotations]
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    for inside, category in sorted(parts, key=lambda part: -part[0].sum()):
        expected[inside] = {3: 1, 7: 2}[category]
    assert (mask_of(root) == expected).all()


def test_background_may_be_ignored_or_a_class(root: Path) -> None:
    done = convert(root, coco(annotation(1, 3, [box(0, 0, 5, 5)])), background="ignore")
    assert done.class_names == ("cat", "dog")
    assert mask_of(root)[0, 0] == 0
    assert mask_of(root)[10, 10] == 255
    (root / "masks").rename(root / "old")
    done = convert(root, coco(annotation(1, 3, [box(0, 0, 5, 5)])), background="dog")
    assert done.class_names == ("cat", "dog")
    assert mask_of(root)[10, 10] == 1


def test_lost_regions_are_counted(root: Path) -> None:
    done = convert(
        root,
        coco(
            annotation(1, 3, [box(50, 50, 60, 60)]),  # outside
            annotation(2, 3, [box(2, 2, 6, 6)]),
            annotation(3, 7, [box(2, 2, 6, 6)]),  # covers the one before
        ),
    )
    assert (done.n_regions, done.n_empty, done.n_hidden) == (3, 1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "is no COCO file: it must hold lists of"),
        (coco(annotation(1, 9, [box(0, 0, 5, 5)])), "1 annotation.* category_id that is not in"),
        (coco(annotation(1, 3, [box(0, 0, 5, 5)], image_id=5)), "1 .* image_id that is not in"),
        (coco(annotation(1, 3, [])), "annotation 1 has no segmentation, only a box"),
        (coco(annotation(1, 3, [[1, 2, 3, 4]])), "a polygon of 4 numbers"),
        (coco(annotation(1, 3, {"size": [9, 9], "counts": [81]})), r"a mask of \[9, 9\] pixels"),
        (coco(annotation(1, 3, {"size": [20, 30], "counts": [81]})), "81 pixels, not 20 x 30"),
        (coco(annotation(1, 3, {"size": [20, 30], "counts": "#!"})), "encoding that is broken"),
        (coco(annotation(1, 3, [box(0, 0, 5, float("nan"))])), "a corner that is no number"),
        (coco(images=[{"id": 1, "file_name": "b.jpg"}]), r"1 annotated image\(s\) are not there"),
        (coco(images=[{"id": 1, "file_name": "/x/b.jpg"}]), "must lie in --images"),
        (coco(images=[{"id": 1, "file_name": "../b.jpg"}]), "must lie in --images"),
        (
            coco(images=[{"id": 1, "file_name": "a.jpg", "height": 30, "width": 20}]),
            "a.jpg is 30x20 pixels, but a.json, image 1 was drawn on 20x30",
        ),
        (
            coco(images=[{"id": n, "file_name": "a.jpg"} for n in (1, 2)]),
            "would have one mask, a.png",
        ),
        (coco(categories=[{"id": 1, "name": "x"}, {"id": 2, "name": "x"}]), r"repeated: \['x'\]"),
        (coco(categories=[{"id": 1}]), "an entry lacks 'name'"),
    ],
)
def test_wrong_coco_files_write_nothing(root: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert(root, content)
    assert sorted(path.name for path in root.iterdir()) == ["a.json", "images"]


def test_labels_outside_the_classes_are_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"'dog' \(1 region\(s\), near 'dogs'\).*add them to"):
        convert(root, coco(annotation(1, 7, [box(0, 0, 5, 5)])), class_names=["cat", "dogs"])


def test_masks_are_not_overwritten(root: Path) -> None:
    (root / "masks").mkdir()
    (root / "masks/mine.png").write_text("precious")
    with pytest.raises(DataError, match="has files already"):
        convert(root, coco())
    assert [path.name for path in (root / "masks").iterdir()] == ["mine.png"]


def shape(label: str, points: Any, kind: str = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, **more}


def labelme(root: Path, *shapes: dict[str, Any], name: str = "a", **changes: Any) -> None:
    content = {"shapes": shapes, "imagePath": f"{name}.jpg", "imageHeight": 20, "imageWidth": 30}
    path = root / "images" / f"{name}.json"
    path.write_text(json.dumps(content | changes))


RECTANGLE = shape("a", [[2, 3], [9, 8]], "rectangle")


def convert_labelme(root: Path, background: str = "background", **options: Any) -> Conversion:
    pictures, names = read_labelme(root / "images", root / "images", background)
    names = options.pop("class_names", names)
    return draw_masks(pictures, root / "masks", names, background, **options)


def test_labelme_draws_in_order_with_borders(root: Path) -> None:
    square = [[2, 3], [9, 3], [9, 8], [2, 8]]
    labelme(
        root,
        shape("cat", square),
        shape("ant", [[8, 7], [12, 10]], "rectangle"),
        shape("__ignore__", [[20, 0], [29, 4]], "rectangle"),
        shape("_background_", [[3, 4], [4, 5]], "rectangle"),
    )
    done = convert_labelme(root)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[3:9, 2:10] = 2
    expected[7:11, 8:13] = 1
    expected[0:5, 20:30] = 255
    expected[4:6, 3:5] = 0
    assert (mask_of(root) == expected).all()
    assert done.class_names == ("background", "ant", "cat")


def test_labelme_polygons_agree_with_pil(root: Path) -> None:
    polygons = [(RNG.random((7, 2)) * [WIDTH, HEIGHT]).tolist() for _ in range(5)]
    labelme(root, *(shape(f"c{n}", polygon) for n, polygon in enumerate(polygons)))
    convert_labelme(root)
    canvas = Image.new("L", (WIDTH, HEIGHT))
    for number, polygon in enumerate(polygons, 1):
        ImageDraw.Draw(canvas).polygon([tuple(p) for p in polygon], fill=number, outline=number)
    assert (mask_of(root) == np.array(canvas)).all()


def test_labelme_circles_and_masks(root: Path) -> None:
    part = RNG.random((4, 6)) > 0.5
    file = io.BytesIO()
    Image.fromarray(part).save(file, "PNG")
    packed = base64.b64encode(file.getvalue()).decode()
    labelme(
        root,
        shape("disc", [[10, 9], [10, 4]], "circle"),
        shape("blob", [[22, 12], [27, 15]], "mask", mask=packed),
    )
    convert_labelme(root)
    mask = mask_of(root)
    assert (mask[12:16, 22:28] == part).all()  # blob is 1
    yy, xx = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(yy - 9, xx - 10)
    assert (mask[distance < 4.5] == 2).all()
    assert (mask[(distance > 5.8) & (xx < 20)] == 0).all()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda r: None, "no JSON file in"),
        (lambda r: labelme(r, shape("a", [[1, 1]], "point")), "without an area: 1 point; draw"),
        (lambda r: labelme(r, shape("a", [[1, 1], [2, 2]])), r"has 2 point\(s\), not 3 or more"),
        (
            lambda r: labelme(r, RECTANGLE, imageHeight=99),
            "is 30x20 pixels, but a.json was drawn on 30x99",
        ),
        (lambda r: labelme(r, RECTANGLE, imagePath="c.jpg"), "are not there"),
        (lambda r: labelme(r, imagePath="../../c.jpg"), "set --images"),
        (lambda r: labelme(r, {"label": "a"}), "without label or points"),
        (lambda r: labelme(r, shape("a", [[0, 0], [9, 9], [float("inf"), 0]])), "is no number"),
        (lambda r: (r / "images/x.json").write_text("{}"), "x.json is no file of Labelme"),
        (lambda r: (r / "images/x.json").write_text("{"), "cannot read .*x.json"),
        (
            lambda r: labelme(r, shape("a", [[1, 1], [2, 2]], "mask", mask="eA==")),
            "the mask of 'a' cannot be read",
        ),
    ],
)
def test_wrong_labelme_files_write_nothing(
    root: Path, write: Callable[[Path], object], message: str
) -> None:
    write(root)
    with pytest.raises(DataError, match=message):
        convert_labelme(root)
    assert [path.name for path in root.iterdir()] == ["images"]


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    for split, label in (("train", "cat"), ("val", "ant")):
        root = tmp_path / split
        save_images(root / "images", "a.jpg")
        labelme(root, shape(label, [[2, 3], [9, 8]], "rectangle"))
        convert_labelme(root)
    module = FolderDataModule(str(tmp_path), ["background", "cat"])
    with pytest.raises(DataError, match=r"val/masks/classes.txt says that the masks hold .*'ant'"):
        module.setup("fit")
    from seglab.data.inspection.guess import guess_folder

    with pytest.raises(DataError, match="with the same --classes"):
        guess_folder(tmp_path)


def test_nested_names_keep_their_folders(tmp_path: Path) -> None:
    save_images(tmp_path / "images", "x/1.jpg", "y/1.jpg")
    entries = [{"id": n, "file_name": f"{d}/1.jpg"} for n, d in enumerate("xy", 1)]
    entries = [entry | {"height": HEIGHT, "width": WIDTH} for entry in entries]
    convert(tmp_path, coco(annotation(1, 3, [box(0, 0, 5, 5)]), images=entries))
    assert mask_of(tmp_path, "x/1.png")[0, 0] == 1
    assert mask_of(tmp_path, "y/1.png")[0, 0] == 0
