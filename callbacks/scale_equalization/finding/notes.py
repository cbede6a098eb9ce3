"""Notes on tensors: who made a map, how it was resized, which concatenations it has passed.

They give a report its names and its reasons. What may be folded is decided by `probing`, whatever
they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import operations as ops

NONE: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Note:
    """What is known of one tensor.

    Attributes:
        source: Module that made it; "" for the network's input.
        upsampling: Ratio of heights gained by resizing since then, or since it was joined.
        interpolation: Mode of the last resizing since then.
        constant: Whether it depends on parameters and constants only.
        upstream: Keys of linear layers that take joined maps and whose output reaches it.
        levels: The encoder's outputs and the resized maps it was made from, numbered.
        joins: Joins passed since the last linear layer, by number.
        depth: How many of them lie one behind the other.
        joined: The join whose very result it is.
        blocked: The reason, once an operation has changed the scale of its branches.
        follows: Key of the linear layer whose output it is, up to homogeneous operations.
        nonlinear: Whether one of these was not linear.
        in_encoder: Whether it was made in a module that is left alone.
    """

    source: str = ""
    upsampling: float = 1.0
    interpolation: str | None = None
    constant: bool = False
    upstream: frozenset[int] = NONE
    levels: frozenset[int] = NONE
    joins: frozenset[int] = NONE
    depth: int = 0
    joined: int | None = None
    blocked: str = ""
    follows: int | None = None
    nonlinear: bool = False
    in_encoder: bool = False

    def but(self, **changes: Any) -> Note:
        """A changed copy: `dataclasses.replace`, four times as fast, once for each operation."""
        other = object.__new__(Note)
        other.__dict__.update(self.__dict__)
        other.__dict__.update(changes)
        return other


@dataclass(frozen=True, eq=False)
class Join:
    """A concatenation, a stack, or a map written into a part of another.

    Attributes:
        number: Its place in the order of the forward pass.
        module: Module it happens in.
        dim: The dimension along which it joins; -1 for a writing.
        widths: Lengths of the operands along `dim`.
        notes: What is known of the operands.
        depth: Joins behind it since the last linear layer; those of one depth are probed together.
        in_encoder: Whether it happens in a module that is left alone; then it is not probed.
        rank: Number of dimensions of the result; 0 for a writing.
    """

    number: int
    module: str
    dim: int
    widths: tuple[int, ...]
    notes: tuple[Note, ...] = field(repr=False)
    depth: int = 0
    in_encoder: bool = False
    rank: int = 0

    @property
    def is_writing(self) -> bool:
        """Whether a map is written into a part of another."""
        return self.dim < 0

    @property
    def joins_channels(self) -> bool:
        """Whether its dimension is that of channels: of maps, the second or the last."""
        return self.rank > 3 and self.dim in (1, self.rank - 1)


def union(sets: Sequence[frozenset[int]]) -> frozenset[int]:
    """Of all sets."""
    filled = {each for each in sets if each}
    if len(filled) > 1:
        return frozenset().union(*filled)
    return filled.pop() if filled else NONE


def follow(
    func: Any,
    name: str,
    module: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    pairs: Sequence[tuple[Tensor, Note]],
    output: Tensor,
) -> Note:
    """The note of an operation's result that neither joins maps nor is a linear layer.

    Args:
        func: The operation.
        name: Its one name.
        module: Name of the module it runs in.
        args: Its arguments.
        kwargs: Its keyword arguments.
        pairs: The tensors among them, each with its note as it was before.
        output: The result.
    """
    if not pairs or name in ops.FACTORIES:
        return Note(module)
    notes = [note for _, note in pairs]
    place = _subject(name, notes)
    tensor, subject = pairs[place]
    fixed = all(note.constant for note in notes[:place] + notes[place + 1 :])
    made = _described(func, name, module, args, kwargs, subject, tensor, output, fixed)
    return made.but(
        constant=all(note.constant for note in notes),
        upstream=union([note.upstream for note in notes]),
        joins=union([note.joins for note in notes]),
        depth=max(note.depth for note in notes),
        joined=None,
        blocked=next((note.blocked for note in notes if note.blocked), ""),
    )


def _subject(name: str, notes: Sequence[Note]) -> int:
    """Which input the result is about: a joined map before a map before a parameter."""
    if name in ops.NORMALIZATIONS or name in ops.RESIZES:
        return 0
    ranks = [0 if note.joins else 1 if not note.constant else 2 for note in notes]
    return ranks.index(min(ranks))


def _described(
    func: Any,
    name: str,
    module: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    subject: Note,
    before: Tensor,
    after: Tensor,
    fixed: bool,
) -> Note:
    """Source and resizing of the result."""
    if name in ops.RESIZES and after.dim() > 2:
        return _resized(func, name, args, kwargs, subject, before, after)
    if name in ops.POOLS:
        return subject.but(source=module, upsampling=1.0, interpolation=None)
    if name in ops.KEEPERS and fixed:
        nonlinear = subject.nonlinear or (subject.follows is not None and name in ops.NONLINEAR)
        return subject.but(nonlinear=nonlinear)
    if name in ops.SUMS and any(isinstance(arg, (int, float)) and arg == 0 for arg in args):
        return subject  # the first step of Python's sum() over a list of maps: 0 + x
    if fixed and before.shape == after.shape:  # an activation, a normalization
        return Note(module, subject.upsampling, subject.interpolation)
    return Note(module)


def _resized(
    func: Any,
    name: str,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    subject: Note,
    before: Tensor,
    after: Tensor,
) -> Note:
    if before.shape == after.shape:
        return subject
    if before.dim() != after.dim():
        return Note(subject.source)
    rows, columns = (
        after.shape[i] / max(before.shape[i], 1) for i in (-2 if after.dim() > 3 else -1, -1)
    )
    ratio = rows if rows != 1.0 else columns
    mode = ops.resize_mode(func, name, args, kwargs)
    return subject.but(upsampling=subject.upsampling * ratio, interpolation=mode)


def with_writing(before: Note, made: Note, join: Join, module: str) -> Note:
    """The note of a map that another was written into."""
    return before.but(
        source=module,
        constant=False,
        joined=None,
        upstream=before.upstream | made.upstream,
        levels=before.levels | made.levels,
        joins=before.joins | made.joins | {join.number},
        depth=max(before.depth, made.depth + 1),
    )
