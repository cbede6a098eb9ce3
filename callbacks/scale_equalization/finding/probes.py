"""Forward passes with what is joined multiplied, and how what arrives at each layer is compared."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from . import operations as ops
from .calls import Call
from .notes import Join, Note
from .observer import Observer

N_SAMPLES = 64
FEW = 64  # values per channel below which all are made positive, so that no ReLU blanks a channel

Part = tuple[int, int]  # number of a join, number of its operand


@dataclass(eq=False)
class _Recorded:
    call: Call
    input: Tensor
    output: Tensor


class Reference(Observer):
    """The run that the others are compared with.

    Args:
        model: The network.
        exclude: Patterns of what is left alone.
        randomize: Join random values in the place of the real ones.
        whole: Keep what happens before the first join as well, and what norms and activations give.
    """

    def __init__(
        self, model: nn.Module, exclude: Sequence[str], randomize: bool, whole: bool = False
    ) -> None:
        super().__init__(model, exclude)
        self.randomize, self.whole = randomize, whole
        self.calls: list[tuple[Call, int]] = []
        self.recorded: dict[int, _Recorded] = {}
        self.samples: list[Tensor] = []
        self.results: list[Tensor] = []
        self.parts: list[Part] = []
        self.obstacles: dict[int, str] = {}
        self.dtypes: set[torch.dtype] = set()

    def join(self, join: Join, part: int, values: Tensor) -> Tensor:
        """Note the part."""
        if not values.is_floating_point() and not values.is_complex():
            return values
        self.parts.append((join.number, part))
        self.dtypes.add(values.dtype)
        return _randomized(join, part, values) if self.randomize else values

    def made(self, name: str, output: Tensor) -> Tensor:
        """Keep what a normalization or an activation gave."""
        if self.whole and self.module not in self.encoder:
            self.results.append(output.clone())
        return output

    @property
    def rounding(self) -> float:
        """What the coarsest numbers that occur can change in the norm of a channel."""
        units = [torch.finfo(dtype).eps for dtype in self.dtypes if dtype.is_floating_point]
        return 4.0 * max(units) if max(units, default=0.0) > 1e-6 else 1e-3

    def consume(self, call: Call) -> Tensor | None:
        """Keep what the layer took and gave."""
        slim = call.without_tensors()
        self.calls.append((slim, call.input.shape[call.dim]))
        if call.module in self.encoder or not (self.parts or self.whole):
            return None
        self.obstacles[call.number] = _obstacle(call)
        if self.obstacles[call.number]:
            return None
        output = call.run()
        self.recorded[call.number] = _Recorded(slim, call.input.clone(), output.clone())
        return output

    def result(self, name: str, inputs: Sequence[Note], note: Note, output: Tensor) -> Note:
        """Keep a sample of it."""
        self.samples.append(_sample(output))
        self.dtypes.add(output.dtype)
        return note


class _Multiplied(Observer):
    """A run in which parts of joins are multiplied; every layer gives out what it gave before."""

    def __init__(
        self,
        model: nn.Module,
        exclude: Sequence[str],
        reference: Reference,
        factors: Mapping[Part, float],
    ) -> None:
        super().__init__(model, exclude)
        self.reference, self.factors = reference, factors
        self.diverged = False

    def join(self, join: Join, part: int, values: Tensor) -> Tensor:
        if not values.is_floating_point() and not values.is_complex():
            return values
        values = _randomized(join, part, values) if self.reference.randomize else values
        return values * self.factors.get((join.number, part), 1.0)

    def consume(self, call: Call) -> Tensor | None:
        known = self.reference.recorded.get(call.number)
        if known is None:
            return None
        if known.call.key != call.key or known.input.shape != call.input.shape:
            self.diverged = True
        if self.diverged:
            return None
        self.arrive(call, known.input)
        return known.output.clone()

    def arrive(self, call: Call, before: Tensor) -> None:
        """Compare a layer's input with that of the reference run."""


class Probe(_Multiplied):
    """A run in which the parts of one group of joins are multiplied by powers of two."""

    def __init__(
        self,
        model: nn.Module,
        exclude: Sequence[str],
        reference: Reference,
        exponents: Mapping[Part, int],
        base: int,
    ) -> None:
        super().__init__(model, exclude, reference, {p: 2.0**k for p, k in exponents.items()})
        self.base = base
        self.arrived: dict[int, tuple[Tensor | None, str]] = {}
        self.samples = 0

    def arrive(self, call: Call, before: Tensor) -> None:
        """Read the exponents."""
        exponents = None
        if not torch.equal(before, call.input):
            exponents = exponents_of(before, call.input).movedim(call.dim, 0)
        self.arrived[call.number] = exponents, call.note.blocked

    def result(self, name: str, inputs: Sequence[Note], note: Note, output: Tensor) -> Note:
        """Note the operation after which a sample is no longer the old one times a power."""
        place, self.samples = self.samples, self.samples + 1
        if self.diverged or place >= len(self.reference.samples):
            return note
        before, after = self.reference.samples[place], _sample(output)
        if (
            before.shape == after.shape
            and not is_broken(exponents_of(before, after), self.base).any()
        ):
            return note
        spoilt_here = any(each.joins and not each.blocked for each in inputs)
        return note.but(blocked=ops.obstacle(name)) if spoilt_here else note


class OddFactors(_Multiplied):
    """A run in which all parts are multiplied by numbers that are no powers of two.

    Rounding to a few bits, or anything done to mantissas, is proportional in powers of two only.

    Args:
        model: The network.
        exclude: Patterns of what is left alone.
        reference: The run to compare with.
        factors: One for each part.
        expected: For calls of layers, what each input channel is to be multiplied by; NaN where
            that is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        exclude: Sequence[str],
        reference: Reference,
        factors: Mapping[Part, float],
        expected: Mapping[int, Tensor],
    ) -> None:
        super().__init__(model, exclude, reference, factors)
        self.expected = expected
        self.wrong: dict[int, Tensor] = {}

    def arrive(self, call: Call, before: Tensor) -> None:
        """Find the channels that are not what they were times their factor."""
        factor = self.expected.get(call.number)
        if factor is None:
            return
        then, now = (
            x.detach().movedim(call.dim, 0).reshape(len(factor), -1).cpu().double()
            for x in (before, call.input)
        )
        then = then * factor[:, None]
        error, size = (now - then).norm(dim=1), then.norm(dim=1)
        self.wrong[call.number] = ~(error <= self.reference.rounding * size) & ~factor.isnan()


class Origins(_Multiplied):
    """A run in which what layers, norms and activations make is multiplied by powers of two.

    If the channels of one input carry several of them, maps were put together there, whatever the
    operation; of concatenations that is known already.
    """

    def __init__(
        self, model: nn.Module, exclude: Sequence[str], reference: Reference, base: int
    ) -> None:
        super().__init__(model, exclude, reference, {})
        self.powers = itertools.cycle(range(base, 2 * base))
        self.results = iter(reference.results)
        self.base = base
        self.found: list[str] = []

    def made(self, name: str, output: Tensor) -> Tensor:
        """What it gave before, multiplied."""
        if self.module in self.encoder:
            return output
        before = next(self.results, output)
        return self._multiplied(before if before.shape == output.shape else output)

    def left(self, output: Any) -> Any:
        """Every map of an encoder by itself."""
        return tree_map_only(Tensor, self._multiplied, output)

    def consume(self, call: Call) -> Tensor | None:
        """What it gave before, multiplied."""
        output = super().consume(call)
        return output if output is None else self._multiplied(output)

    def _multiplied(self, output: Tensor) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(output):
            return output
        return output * 2.0 ** next(self.powers) if output.is_floating_point() else output

    def arrive(self, call: Call, before: Tensor) -> None:
        """Find layers whose channels are of several origins."""
        if call.note.joins or torch.equal(before, call.input):
            return
        exponents = exponents_of(before, call.input).movedim(call.dim, 0)
        exponents = exponents.reshape(len(exponents), -1)
        blank = exponents == NOTHING
        low = torch.where(blank, NOTHING, exponents).amin(dim=1)
        high = torch.where(blank, -NOTHING, exponents).amax(dim=1)
        powers = low[(low == high) & (low >= self.base) & (low < 2 * self.base)]
        if len(set(powers.tolist())) > 1:
            self.found.append(call.module)


def _obstacle(call: Call) -> str:
    """Why a call cannot even be looked at."""
    if torch._C._functorch.is_functorch_wrapped_tensor(call.input):
        return "it runs inside torch.func.vmap or grad, where a branch cannot be measured"
    if call.input.is_complex():
        return "a branch is complex-valued; its scale is not defined here"
    return ""


def _randomized(join: Join, part: int, values: Tensor) -> Tensor:
    """Random values in the place of an operand: no channel is blank, both signs occur.

    An operand that was joined before has them already.
    """
    if join.notes[part].joins or torch._C._functorch.is_functorch_wrapped_tensor(values):
        return values
    generator = torch.Generator().manual_seed(1000 * join.number + part)
    fresh = torch.randn(values.shape, generator=generator, device="cpu")
    width = join.widths[part] if not join.is_writing else max(values.shape[0], 1)
    if values.numel() < FEW * max(width, 1):
        fresh = fresh.abs_()
    return fresh.to(values.device, values.dtype)


_BROKEN = -10_000  # not a power of two
NOTHING = 10_000  # zero before and after: any power would do


def exponents_of(before: Tensor, after: Tensor) -> Tensor:
    """For every element k, if after == before * 2**k exactly."""
    wide = torch.float64 if before.dtype == torch.float64 else torch.float32
    before, after = before.detach().to(wide), after.detach().to(wide)
    m_before, e_before = torch.frexp(before)
    m_after, e_after = torch.frexp(after)
    exponents = (e_after - e_before).to(torch.int32)
    tiny = torch.finfo(wide).tiny * 4
    nothing = (before.abs() < tiny) & (after.abs() < tiny * 2.0**50)
    broken = (m_before != m_after) | ~torch.isfinite(before) | ~torch.isfinite(after)
    exponents[broken] = _BROKEN
    exponents[nothing] = NOTHING
    return exponents


def is_broken(exponents: Tensor, base: int) -> Tensor:
    """Where an element is neither untouched nor multiplied by one of the powers, once."""
    touched = (exponents >= base) & (exponents < 2 * base)
    return ~(touched | (exponents == 0) | (exponents == NOTHING))


def _sample(output: Tensor) -> Tensor:
    """Some elements of a tensor, the same of every tensor of its shape."""
    if torch._C._functorch.is_functorch_wrapped_tensor(output):
        return torch.zeros(0, device="cpu")
    if output.is_complex():
        output = torch.view_as_real(output.resolve_conj())
    generator = torch.Generator().manual_seed(output.numel())
    where = [
        torch.randint(n, (N_SAMPLES,), generator=generator, device="cpu") for n in output.shape
    ]
    if not output.numel() or not where:
        return output.detach().double().reshape(-1).clone()
    return output.detach()[tuple(index.to(output.device) for index in where)].double()
