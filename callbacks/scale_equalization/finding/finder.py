"""find_fusions and examine: a network and an input in, fusions and refusals out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from scale_equalization.fusion import (
    Findings,
    Fusion,
    NoFusionError,
    Refusal,
    ScaleEqualizationError,
)
from scale_equalization.layers import trained_weight, unwrap
from scale_equalization.patterns import DEFAULT_EXCLUDE
from scale_equalization.state import calibrating

from .calls import Call
from .deciding import CHANGED, decide
from .modes import in_both_modes
from .observer import Observer
from .probing import differs_between_runs, gather_evidence

_LONGEST_LIST = 20
Listener = Callable[[Fusion, Call], Tensor | None]


def find_fusions(
    model: nn.Module,
    *inputs: Any,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    **kwargs: Any,
) -> tuple[Fusion, ...]:
    """Find the layers whose input channels are concatenated branches, in forward order.

    Args:
        model: Any network; DDP and `torch.compile` wrappers are looked through.
        *inputs: Passed to ``model(*inputs, **kwargs)`` a few times, without gradients.
        include: Shell patterns of the consumers' names to take.
        exclude: Shell patterns to leave alone; by default the encoder.
        **kwargs: Passed to the model.

    Raises:
        NoFusionError: None was found; the message lists what was seen instead.

    >>> import torch
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fuse = nn.Conv2d(6, 4, 3)
    ...     def forward(self, x):
    ...         return self.fuse(torch.cat([x, x.flip(3)], dim=1))
    >>> find_fusions(Net(), torch.zeros(1, 3, 8, 8))[0].name
    'fuse'
    """
    model = unwrap(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        model = _with_memory(model)
        inputs, kwargs = tree_map_only(Tensor, _with_values, (inputs, kwargs))

    def run() -> Any:
        fresh, named = tree_map_only(Tensor, torch.clone, (inputs, kwargs))
        return model(*fresh, **named)

    findings = examine(model, run, include=include, exclude=exclude)
    require_fusions(findings)
    return findings.fusions


def _with_memory(model: nn.Module) -> nn.Module:
    """Of a network on the meta device, where nothing can be run, a copy with random weights."""
    replica = copy.deepcopy(model).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in replica.parameters():
            parameter.normal_(0.0, 0.1, generator=generator)
        for buffer in replica.buffers():
            buffer.fill_(1.0 if buffer.is_floating_point() else 0)
    return replica


def _with_values(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor.dtype)


def examine(
    model: nn.Module,
    forward: Callable[[], Any],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> Findings:
    """Run `forward`, which runs `model`, a few times, and say what is fused and what is not."""
    _refuse_lazy(model)
    evidence = gather_evidence(model, forward, exclude)
    findings = decide(model, evidence, include, exclude)
    findings = in_both_modes(model, findings, forward, include, exclude)
    unexplained = any(refusal.reason == CHANGED for refusal in findings.refusals)
    if unexplained and differs_between_runs(model, forward, exclude):
        return _unsteady(findings)
    return findings


def _unsteady(findings: Findings) -> Findings:
    reason = (
        "its input differs between two runs over the same batch (a random stream that cannot be "
        "rewound, or a count): make the forward pass repeatable while it is examined"
    )
    refusals = tuple(
        Refusal(r.name, reason) if r.reason == CHANGED else r for r in findings.refusals
    )
    return replace(findings, refusals=refusals)


def require_fusions(findings: Findings) -> None:
    """Raise NoFusionError, with everything that was seen, if there is nothing to equalize."""
    if findings.fusions:
        return
    lines = ["no concatenation that feeds a linear layer can be equalized."]
    lines += _listed("seen", findings.seen) or ["  no concatenation was seen"]
    lines += _listed("left alone", [f"{r.name}: {r.reason}" for r in findings.refusals])
    lines.append("Check include/exclude, and that the forward pass given runs the decoder.")
    raise NoFusionError("\n".join(lines))


def _listed(title: str, texts: Sequence[str]) -> list[str]:
    """One line each; of a long list, the end, where the decoder is."""
    more = len(texts) - _LONGEST_LIST
    lines = [f"  {title}: {text}" for text in texts[-_LONGEST_LIST:]]
    return [f"  {title}: {more} more before these", *lines] if more > 0 else lines


def _refuse_lazy(model: nn.Module) -> None:
    """Looking at a network must not be what initializes it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ScaleEqualizationError(
                f"{name} is not initialized yet (a lazy module): run one forward pass first"
            )
        if tensor.is_meta:
            raise ScaleEqualizationError(
                f"{name} is on the meta device, where nothing can be run: give the network memory "
                "first (to_empty and its initialization)"
            )


class _Listening(Observer):
    """Tells a listener about the calls of known fusions."""

    def __init__(self, model: nn.Module, fusions: Sequence[Fusion], listen: Listener) -> None:
        super().__init__(model, ())
        self.listen = listen
        self.known = {id(trained_weight(model, fusion)): fusion for fusion in fusions}

    def consume(self, call: Call) -> Tensor | None:
        fusion = self.known.get(call.key)
        if fusion is None:
            return None
        other = self.listen(fusion, call)
        return None if other is None else call.run(weight=other)


@contextmanager
def watching(model: nn.Module, fusions: Sequence[Fusion], listen: Listener) -> Iterator[None]:
    """Listen at the layers of known fusions while the network runs.

    Args:
        model: The network.
        fusions: From `find_fusions`.
        listen: Called with a fusion and the call of its layer, before it happens; may return a
            weight to use instead.
    """
    with calibrating(model), _Listening(model, fusions, listen).watching():
        yield
