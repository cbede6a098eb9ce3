"""Find pairs of images and masks by patterns or in a list file.

Patterns are relative to a root. In a pattern for images, ``*`` and ``?`` match within a name,
``**`` any folders, and ``{split}`` stands for the split. In a pattern for masks, ``{stem}`` is what
the last ``*`` of the image's name matched (its stem, where the pattern ends in ``*`` or ``*.ext``),
``{folder}`` the image's folder, ``{subfolder}`` its part that is not written in the pattern. A
pattern for masks without a slash means the image's own folder.
"""

import csv
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from seglab.data.errors import DataError, MissingDataError, UnpairedError
from seglab.data.sources.files import Item
from seglab.data.sources.listing import holds
from seglab.data.sources.masks import MASK_SUFFIXES
from seglab.data.sources.reading import IMAGE_SUFFIXES
from seglab.sentences import listed

_BLENDING = (
    ".jpg",
    ".jpeg",
    ".JPG",
    ".JPEG",
    ".webp",
    ".gif",
)  # kinds of files that masks cannot have
_PIECES = re.compile(r"\*\*/|\*\*|\*|\?|[^*?]+")


class Entry(NamedTuple):
    """A pair of files, and the split that a list file gives it, if any."""

    item: Item
    split: str | None = None


def find_pairs(
    root: Path,
    images: str,
    masks: str,
    split: str,
    cure: str,
    names: Collection[str] | None = None,
) -> list[Item]:
    """Pair the images that match a pattern with their masks.

    Args:
        root: Folder that patterns are relative to.
        images: Pattern of the images.
        masks: Pattern of an image's mask.
        split: What `{split}` stands for.
        cure: What to do where there are no images, for the error.
        names: Take these images only, each a path in `root` or its end, without suffix; each must
            be there once.

    Raises:
        DataError: If nothing matches, a mask is missing, two images share a name, or a mask in a
            folder of masks belongs to no image (unless `names` are given); names the first three.
    """
    pattern = images.replace("{split}", split)
    matcher = _compile(pattern)
    check_mask_kind(masks)
    items, missing, blended = [], {}, []
    chosen = None if names is None else _Chosen(names)
    fixed = _fixed_part(pattern)
    for path in sorted((root / fixed).rglob("*")):
        relative = path.relative_to(root).as_posix()
        match = matcher.fullmatch(relative)
        if not match or path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if chosen is not None and not chosen.takes(relative):
            continue
        mask, tried, others = _find_mask(root, path, masks.replace("{split}", split), match, fixed)
        if mask == path:
            continue  # the pattern for images also matches masks
        name = relative.removeprefix(fixed).rpartition(".")[0]
        if mask:
            items.append(Item(path, mask, name))
        else:
            missing[path] = f"{path} (no {tried})"
            blended += others
    used = {item.mask for item in items}  # the pattern for images may match them, too
    lacking = [text for path, text in missing.items() if path not in used]
    if lacking:
        raise UnpairedError(
            f"{len(lacking)} image(s) have no mask: {listed(lacking)}; add the masks, move the "
            "images away, or set data.masks to where they are",
            len(lacking),
            len(items),
            blended[0] if blended else "",
        )
    if not items:
        place = root / fixed
        what = f"no image in {root} matches {pattern!r}" if place.is_dir() else f"no folder {place}"
        raise MissingDataError(f"{what}; {cure}; {holds(place)}")
    _check_distinct(items)
    if chosen is None:
        _check_leftover(items, masks)
    else:
        chosen.check()
    return items


class _Chosen:
    """Images chosen by name, and which of them were met."""

    def __init__(self, names: Collection[str]) -> None:
        self.found: dict[str, str | None] = dict.fromkeys(names)

    def takes(self, relative: str) -> bool:
        """Whether an image, a path in the root, is named by its path or the path's end."""
        parts = relative.rpartition(".")[0].split("/")
        ends = ["/".join(parts[start:]) for start in range(len(parts))]
        name = next((end for end in ends if end in self.found), None)
        if name is None:
            return False
        if self.found[name] is not None:
            raise UnpairedError(
                f"the list's name {name!r} means {self.found[name]} and {relative}: write the "
                "folder before the name",
                len(self.found),
            )
        self.found[name] = relative
        return True

    def check(self) -> None:
        """Refuse names that no image has."""
        lost = [name for name, path in self.found.items() if path is None]
        if lost:
            raise UnpairedError(
                f"{len(lost)} name(s) of the list are no image that data.images matches: "
                f"{listed(lost)}; correct the list or data.images",
                len(lost),
                len(self.found) - len(lost),
            )


def check_mask_kind(masks: str) -> None:
    """Refuse a pattern of masks that asks for a kind of files that cannot hold class ids.

    Raises:
        DataError: For JPEG, WebP and GIF.
    """
    suffix = Path(masks).suffix
    if suffix.lower() in _BLENDING:
        raise DataError(
            f"data.masks {masks!r} asks for {suffix} files, which cannot hold class ids: save the "
            f"masks as PNG and write {masks.removesuffix(suffix) + '.png'!r}"
        )


def _check_distinct(items: Sequence[Item]) -> None:
    seen: dict[str, Path] = {}
    for item in items:
        if item.name in seen:
            raise DataError(
                f"{seen[item.name]} and {item.image} have one stem; rename or remove one"
            )
        seen[item.name] = item.image


def _check_leftover(items: Sequence[Item], masks: str) -> None:
    """Refuse masks without an image in folders of masks alone: labels would be lost.

    Files whose names do not end as the pattern says (Cityscapes' ``_color.png`` beside
    ``_labelIds.png``) are something else.
    """
    suffix = Path(masks).suffix
    whole = masks.removesuffix(suffix) if suffix.lower() in MASK_SUFFIXES else masks
    end = whole.rpartition("{stem}")[2]
    used = {item.mask for item in items}
    folders = {item.mask.parent for item in items if item.mask} - {i.image.parent for i in items}
    lonely = sorted(
        path
        for folder in folders
        for path in folder.iterdir()
        if path.suffix.lower() in MASK_SUFFIXES and path not in used and path.name[0] != "."
        if "{stem}" not in masks or path.stem.endswith(end)
    )
    if lonely:
        raise DataError(
            f"{len(lonely)} mask(s) have no image of the same stem: {listed(lonely)}; add the "
            "images or move the masks away"
        )


def _find_mask(
    root: Path, image: Path, pattern: str, match: re.Match[str], fixed: str
) -> tuple[Path | None, str, list[str]]:
    """Return the mask of an image, or None; what was looked for; files of a wrong kind there."""
    stem = image.stem
    if match.lastindex and "*" not in pattern:
        stem = match[match.lastindex].removesuffix(image.suffix) or image.stem
    folder = image.parent.relative_to(root).as_posix()
    subfolder = (folder + "/").removeprefix(fixed).rstrip("/") or "."
    wanted = pattern.replace("{stem}", stem).replace("{folder}", folder)
    wanted = wanted.replace("{subfolder}", subfolder)
    place = root / wanted if "/" in wanted else image.parent / wanted
    if place.suffix.lower() in MASK_SUFFIXES:
        return (place if place.exists() else None), place.name, []
    either = [[place.with_name(place.name + s) for s in (x, x.upper())] for x in MASK_SUFFIXES]
    found = [path for pair in either for path in [p for p in pair if p.exists()][:1]]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1]} are both masks of {image}; remove one")
    others = [place.with_name(place.name + suffix) for suffix in _BLENDING]
    blended = [path for path in others if path.exists() and path != image]
    hint = "".join(f"; {path.name} cannot hold class ids, save masks as PNG" for path in blended)
    return (found[0] if found else None), f"{place.name}.png{hint}", [str(p) for p in blended]


def _fixed_part(pattern: str) -> str:
    """The folders before the first wildcard, with a slash at the end."""
    fixed = re.split(r"[*?]", pattern, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def _compile(pattern: str) -> re.Pattern[str]:
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "([^/]*)", "?": "[^/]"}
    return re.compile("".join(parts.get(p, re.escape(p)) for p in _PIECES.findall(pattern)))


def read_list(root: Path, path: Path) -> list[Entry]:
    """Read a list file: ``image,mask[,split]`` per line, commas, tabs or blanks between.

    Paths are relative to `root`. A first line of column names may stand above, in any order.

    Raises:
        DataError: If the file is unreadable, a line has another number of columns or a file is
            missing; names the first line.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read data.list {path}: {error}") from error
    lines = [(n, _columns(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    order = [0, 1, 2]
    if lines and {"image", "mask"} <= {name.lower() for name in lines[0][1]}:
        head = [name.lower() for name in lines.pop(0)[1]]
        order = [
            head.index("image"),
            head.index("mask"),
            head.index("split") if "split" in head else 99,
        ]
    entries = [_entry(root, path, number, columns, order) for number, columns in lines]
    if not entries:
        raise DataError(f"data.list {path} is empty; write image,mask[,split] per line")
    _check_distinct([entry.item for entry in entries])
    return entries


def _columns(line: str) -> list[str]:
    delimiter = next((sign for sign in (",", "\t", ";") if sign in line), None)
    if delimiter is None:
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _entry(root: Path, path: Path, number: int, columns: list[str], order: list[int]) -> Entry:
    if not max(order[:2]) < len(columns) <= 3:
        raise DataError(
            f"data.list {path}, line {number}: {columns} is not image,mask[,split]; put commas "
            "between names with blanks"
        )
    image, mask = (root / columns[place] for place in order[:2])
    for file in (image, mask):
        if not file.is_file():
            raise MissingDataError(f"data.list {path}, line {number}: no file {file}")
    split = columns[order[2]].lower() if order[2] < len(columns) else None
    name = Path(columns[order[0]]).with_suffix("").as_posix()
    return Entry(Item(image, mask, name.lstrip("/.")), split)
