"""Make new classes out of old ones."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import numpy as np

from seglab.data.sources.source import IGNORE_INDEX, Pixels, Source, SourceWrapper


class ClassGroups:
    """New classes made of old ones; pixels of classes in no group are ignored.

    Args:
        groups: New class name to names of its old classes, in the order of the new ids.
        class_names: Old class names, by id.

    Raises:
        ValueError: If a name is not known or stands in two groups.

    >>> groups = ClassGroups({"street": ["road", "curb"]}, ["sky", "road", "curb"])
    >>> groups.table[:4].tolist(), groups.first_members
    ([255, 0, 0, 255], [1])
    """

    def __init__(self, groups: Mapping[str, Iterable[str]], class_names: Sequence[str]) -> None:
        self.names = tuple(groups)
        self.table = np.full(256, IGNORE_INDEX, np.uint8)
        self.first_members: list[int] = []
        for label, (group, members) in enumerate(groups.items()):
            ids = [_class_id(name, group, class_names) for name in members]
            taken = [class_names[i] for i in ids if self.table[i] != IGNORE_INDEX]
            if taken or not ids:
                raise ValueError(f"data.class_groups: {group!r} is empty or takes {taken} again")
            self.table[ids] = label
            self.first_members.append(ids[0])


def _class_id(name: str, group: str, class_names: Sequence[str]) -> int:
    if name not in class_names:
        near = get_close_matches(name, class_names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"classes are {', '.join(class_names)}"
        raise ValueError(f"data.class_groups: {group!r} names no class {name!r}; {hint}")
    return list(class_names).index(name)


class Grouped(SourceWrapper):
    """A source whose masks are mapped to class groups.

    Args:
        source: Where the samples come from.
        table: New id of every old one, (256,).
    """

    def __init__(self, source: Source, table: Pixels) -> None:
        super().__init__(source)
        self.table = table

    def read(self, index: int, epoch: int = 0) -> tuple[Pixels, Pixels]:
        """Read and map."""
        image, mask = self.source.read(index, epoch)
        return image, self.table[mask]

    def read_mask(self, index: int) -> Pixels:
        """Read the mask and map it."""
        return self.table[self.source.read_mask(index)]
