"""Remarks on a forward pass: norms, weights used elsewhere, sums, what is not followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import operations as ops
from .calls import Log
from .notes import Note

Pairs = Sequence[tuple[Tensor, Note]]


@dataclass(eq=False)
class Remarks:
    """Writes into a log.

    Attributes:
        log: Where to.
        parameters: Identities of the network's parameters.
        reparametrized: For the names of reparametrized layers, the identity of what is trained.
    """

    log: Log
    parameters: set[int]
    reparametrized: Mapping[str, int]

    def use(
        self, module: str, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Of a parameter that something else than its own layer takes a tensor from."""
        for tensor in inputs:
            key = id(tensor)
            if key not in self.parameters or self.reparametrized.get(module) == key:
                continue
            if name in ops.CONSUMERS:
                self.log.uses.setdefault(key, []).append(f"the input of {module}")
            elif name != "grad" and not any(tensor is output for output in outputs):
                self.log.uses.setdefault(key, []).append(f"{name} in {module or 'the model'}")

    def norm(self, module: str, name: str, notes: Sequence[Note]) -> None:
        """Of a normalization behind a linear layer."""
        follows = notes[0].follows if notes else None
        if name not in ops.NORMALIZATIONS or follows is None:
            return
        self.log.followers.setdefault(follows, module)
        if name in ops.CHANNEL_NORMS:
            self.log.cancelled.setdefault(follows, module)
            if not notes[0].nonlinear:
                self.log.norms.setdefault(follows, module)

    def addition(self, module: str, pairs: Pairs, output: Tensor) -> None:
        """Of two maps of one shape, neither of them a parameter or a mere vector."""
        shapes = {tensor.shape for tensor, _ in pairs}
        if len(pairs) != 2 or shapes != {output.shape} or output.dim() < 3:
            return
        positions = output.numel() // (output.shape[0] * output.shape[1]) if output.numel() else 0
        if positions > 1 and not any(note.constant for _, note in pairs):
            self._sum(module, [note for _, note in pairs])

    def reduction(self, module: str, notes: Sequence[Note]) -> None:
        """Of a stack of maps that is summed up again."""
        joined = next((note.joined for note in notes if note.joined is not None), None)
        if joined is not None and all(width == 1 for width in self.log.joins[joined].widths):
            self._sum(module, self.log.joins[joined].notes)

    def _sum(self, module: str, notes: Sequence[Note]) -> None:
        """Kept if it joins levels; a residual connection adds up one and the same."""
        if len({note.levels for note in notes}) > 1:
            self.log.sums.append(module)

    def loss(self, module: str, name: str, func: Any, pairs: Pairs, output: Tensor) -> None:
        """Of a weight that mixes joined channels in a way that is not followed."""
        whole = [tensor for tensor, note in pairs if note.joins and not note.blocked]
        foreign = ops.is_foreign(func) and all(t.shape != output.shape for t in whole)
        weighs = foreign or any(note.constant for _, note in pairs)
        if whole and weighs and (foreign or name in ops.OPAQUE):
            reason = f"its branches go into {name}, which is not followed: only convolutions and "
            self.log.lost.append((module, reason + "F.linear are"))

    def script(self, name: str, module: nn.Module, takes: bool) -> None:
        """Of a scripted or traced module, which runs out of sight, if a join is involved."""
        graph: Any = getattr(module, "inlined_graph", "")
        if takes or "aten::cat" in str(graph):
            reason = "it is TorchScript: what it concatenates or consumes inside is not seen"
            self.log.lost.append((name, reason))
