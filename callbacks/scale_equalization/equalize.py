"""equalize_: find, measure and apply in one call; the door for plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from .batches import find_input
from .folding import fold_, reparametrize_, with_options
from .fusion import Fusion, NoFusionError
from .measuring import measure_scales
from .report import Report, SumMeasure
from .sums import equalize_sums_
from .tracing import DEFAULT_EXCLUDE, unwrap

Mode = Literal["fold", "reparametrize", "off"]
MODES = ("fold", "reparametrize", "off")


def equalize_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: Mode = "fold",
    forward: Callable[[Any], Any] | None = None,
    fusions: Sequence[Fusion] | None = None,
    tolerance: float = 0.01,
    max_batches: int | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    center: bool = False,
    preserve_norm: bool = False,
    placebo: bool = False,
    sums: bool = False,
    force: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> Report:
    """Bring the branches of every feature fusion to the same scale, in place.

    "Scale Equalization for Multi-Level Feature Fusion" (Kim & Kim, TMLR 2024), Algorithm 1, with
    one scalar for each branch and the weights only unless `center`.

    Args:
        model: The network at its initialization, on its device.
        batches: Training batches on the same device; a loader, list or generator.
        mode: "fold" changes the weights once; "reparametrize" trains V with W = V / std, which
            has exactly the dynamics of the explicit equalizer; "off" only measures.
        forward: Runs the network on one batch; default ``model(find_input(batch))``.
        fusions: From `find_fusions`; None finds them on the first batch.
        tolerance: Stop when every std is known this well (relative, 95 % confidence); 0 uses
            every batch.
        max_batches: At most so many batches of this process.
        include: Shell patterns of the consumers' names to take.
        exclude: Shell patterns to leave alone; by default the encoder.
        center: Fold the means into the biases too; exact only away from zero-padded borders.
        preserve_norm: Keep the norm of every fusion weight; only the ratios of slices change.
        placebo: Multiply every slice by one constant that changes the norm as `fold` does: the
            control for the effective learning rate.
        sums: Bring the summands of sum fusions (FPN, LinkNet) to one scale too, by scaling the
            layers that produce them (see `scale_equalization.sums`); not part of the paper.
        force: Change layers too that were equalized or trained before.
        progress: Called with the number of batches done after each.

    Returns:
        The report; ``print(report)`` is a table.

    Raises:
        NoFusionError: There is nothing to equalize.
        AlreadyEqualizedError: A layer was equalized or trained before.
        ScaleEqualizationError: The batches do not allow a measurement.

    >>> import torch
    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fuse = nn.Conv2d(6, 4, 3)
    ...     def forward(self, x):
    ...         return self.fuse(torch.cat([x, 2 * x], dim=1))
    >>> report = equalize_(Net(), [torch.randn(4, 3, 8, 8)])
    >>> round(report.rows[0]["scale"] / report.rows[1]["scale"], 6)
    2.0
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")
    model = unwrap(model)
    run = forward or (lambda batch: model(find_input(batch)))
    limits: dict[str, Any] = {
        "tolerance": tolerance,
        "max_batches": max_batches,
        "exclude": exclude,
    }
    found = _sums(model, batches, run, mode, force, limits) if sums else ()
    try:
        report = measure_scales(
            model, batches, fusions, forward=run, include=include, progress=progress, **limits
        )
    except NoFusionError:
        if not found:
            raise
        return Report((), (), mode=mode, sums=found)
    if found:
        others = (r for r in report.refusals if r.name not in {m.name for m in found})
        report = replace(report, sums=found, refusals=tuple(others))
    report = with_options(
        model, report, center=center, preserve_norm=preserve_norm, placebo=placebo
    )
    return apply_(model, report, mode=mode, force=force)


def _sums(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    mode: Mode,
    force: bool,
    limits: dict[str, Any],
) -> tuple[SumMeasure, ...]:
    if mode == "reparametrize":
        raise ValueError('sums=True scales whole layers once: use mode="fold"')
    return equalize_sums_(model, batches, run, apply=mode == "fold", force=force, **limits)


def apply_(model: nn.Module, report: Report, *, mode: Mode, force: bool = False) -> Report:
    """Apply a report in one of the three modes."""
    if mode == "off":
        return report
    return (fold_ if mode == "fold" else reparametrize_)(unwrap(model), report, force=force)
