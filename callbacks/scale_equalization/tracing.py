"""find_fusions: every layer of a network that fuses concatenated feature maps; changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .fusion import Findings, Fusion, NoFusionError, ScaleEqualizationError
from .judging import judge
from .patterns import DEFAULT_EXCLUDE
from .state import calibrating
from .tracer import Tracer

__all__ = ["DEFAULT_EXCLUDE", "examine", "find_fusions", "require_fusions", "unwrap"]

_LONGEST_LIST = 20


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
        *inputs: Passed to ``model(*inputs, **kwargs)`` once, without gradients.
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
    findings = examine(model, lambda: model(*inputs, **kwargs), include=include, exclude=exclude)
    require_fusions(findings)
    return findings.fusions


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


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of DDP, DataParallel, torch.compile and Fabric."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    names = ("module",) if isinstance(model, wrappers) else ("_orig_mod", "_forward_module")
    inner = next((m for m in (getattr(model, n, None) for n in names) if m is not None), None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def examine(
    model: nn.Module,
    forward: Callable[[], Any],
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> Findings:
    """Watch one call of `forward`, which runs `model`, and judge what was seen."""
    _refuse_lazy(model)
    tracer = Tracer(model, exclude=exclude)
    with calibrating(model), tracer.watching():
        forward()
    return judge(model, tracer.trace, include, exclude)


def _refuse_lazy(model: nn.Module) -> None:
    """Looking at a network must not be what initializes it."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ScaleEqualizationError(
                f"{name} is not initialized yet (a lazy module): run one forward pass first"
            )
