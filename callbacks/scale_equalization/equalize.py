"""equalize_: find all, measure all, check all, apply all, prove; the door for plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .centring import require_centrable
from .copies import find_copies, stale_copies
from .eligibility import left_alone, looks_equalized
from .finding import DEFAULT_EXCLUDE
from .folding import checked_layers, fold_, with_options
from .fusion import Fusion, Refusal
from .layers import MARK, SCALED, layer_of, layers_by_name, trained_parameter, unwrap
from .measuring import Survey
from .planning import Plan, Run, copied, first_and_all, make_plan
from .proving import Explicit, explicit_form, require_equal, require_proportional
from .ranks import gather, together
from .reparametrization import bake_, reparametrize_
from .report import Report
from .state import same_random_streams
from .sums.scaling import layers_of, scalable, scale_sums_

Mode = Literal["fold", "reparametrize", "off"]
MODES = ("fold", "reparametrize", "off")


def equalize_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: Mode = "fold",
    forward: Run | None = None,
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
        forward: Runs the network on one batch, ``forward(model, batch)``; default
            ``model(find_input(batch))``.
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
        sums: Bring the summands of sum fusions (FPN, LinkNet, BiFPN) to one scale too, by scaling
            their edge weights, or else the layers that produce them (see
            `scale_equalization.sums`); not part of the paper.
        force: Change layers too that were equalized or trained before; without it they are left
            alone, and the report says so.
        progress: Called with the number of batches done after each.

    Returns:
        The report; ``print(report)`` is a table.

    Raises:
        ValueError: Options that contradict each other; before any batch is read.
        NoFusionError: There is nothing to equalize.
        UnsupportedFusionError: The changed network does not compute what the explicit form does.
            Then, as after any error, nothing is changed.
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
    check_options(
        mode=mode,
        center=center,
        preserve_norm=preserve_norm,
        placebo=placebo,
        sums=sums,
        tolerance=tolerance,
        max_batches=max_batches,
    )
    model = unwrap(model)
    options = {"center": center, "preserve_norm": preserve_norm, "placebo": placebo}
    with same_random_streams():
        first, stream = first_and_all(batches)
        plan = make_plan(model, first, fusions, forward, include, exclude, sums, force)
        plan.require_something()
        if mode != "off":
            plan = plan.without(left_alone(model, plan.fusions, force))
        if not plan.fusions and not plan.sums:
            return Report((), (), refusals=plan.findings.refusals, mode=mode)
        survey = Survey(model, plan, tolerance, max_batches, progress, respectful=not force)
        report = survey.report(first, stream, batches)
        if mode != "off" and not force:
            plan, report = _without_equalized(model, plan, report)
        report = with_options(model, report, **options)
        if mode == "off" or not (report.fusions or report.sums):
            return replace(report, mode=mode)
        copies = find_copies(model)
        report = _apply_and_prove(model, plan, report, mode, force, survey.last)
        stale = stale_copies(model, report.fusions, copies)
        return replace(report, notes=(*report.notes, *stale))


def check_options(
    *,
    mode: str,
    center: bool = False,
    preserve_norm: bool = False,
    placebo: bool = False,
    sums: bool = False,
    tolerance: float = 0.01,
    max_batches: int | None = None,
) -> None:
    """Refuse what cannot be meant, before anything is read or run.

    Raises:
        ValueError: With the options and the cure.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, but must be one of {', '.join(MODES)}")
    if preserve_norm and placebo:
        raise ValueError("preserve_norm and placebo exclude each other: choose one")
    if center and placebo:
        raise ValueError("a placebo folds no means: leave out center")
    if sums and mode == "reparametrize":
        raise ValueError('sums=True scales whole layers once: use mode="fold"')
    if not tolerance >= 0.0:
        raise ValueError(f"tolerance is {tolerance}, but must be 0 or more")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}, but must be at least 1, or None for all")


def _without_equalized(model: nn.Module, plan: Plan, report: Report) -> tuple[Plan, Report]:
    """Without the layers whose weights show that they were equalized before they were loaded."""
    found = []
    for fusion, measures in zip(report.fusions, report.measures, strict=True):
        weight = trained_parameter(layer_of(model, fusion), fusion.parameter)
        if looks_equalized(weight, fusion, [measure.std for measure in measures]):
            reason = (
                "the slices of its weight are in proportion to the branches already: it comes from "
                "an equalized network; force=True equalizes it all the same"
            )
            found.append(Refusal(fusion.name, reason))
    names = {refusal.name for refusal in found}
    pairs = zip(report.fusions, report.measures, strict=True)
    kept = [(fusion, measures) for fusion, measures in pairs if fusion.name not in names]
    plan = plan.without(found)
    return plan, replace(
        report,
        fusions=tuple(fusion for fusion, _ in kept),
        measures=tuple(measures for _, measures in kept),
        refusals=plan.findings.refusals,
    )


def _apply_and_prove(
    model: nn.Module, plan: Plan, report: Report, mode: Mode, force: bool, last: Sequence[Any]
) -> Report:
    """Change the weights, compare with the explicit form on a batch, or change nothing at all."""
    originals = {f.name: _weight_and_bias(model, f) for f in report.fusions}

    def forward() -> Any:
        return plan.run(model, copied(last[0]))

    def explicit() -> Any:
        if report.fusions:
            checked_layers(model, report, force)
        if not last:
            return None
        if report.fusions:
            evidence = require_proportional(model, plan, forward)
            if report.center:
                require_centrable(model, plan, evidence, forward)
        return explicit_form(model, plan, report, forward)

    expected = together(explicit)
    with _undone_on_error(model, report):
        done = together(lambda: _apply(model, report, mode, force))
        if expected is not None:
            together(lambda: require_equal(model, plan, report, expected, originals, forward))
        else:
            together(lambda: None)
    return replace(done, notes=(*done.notes, *_unproved(report, expected)))


def _unproved(report: Report, expected: Explicit | None) -> list[str]:
    """A remark on the fusions that ran on no rank's batch of the proof."""
    reached = set[str]().union(*gather(expected.reached if expected else set[str]()))
    names = [fusion.name for fusion in report.fusions if fusion.name not in reached]
    reason = "no batch runs all fusions; not proved on real values, since the last that runs most"
    return [f"{reason} does not run them: {', '.join(names)}"] if names else []


def _apply(model: nn.Module, report: Report, mode: Mode, force: bool) -> Report:
    if report.sums:
        scale_sums_(model, report.sums)
    if not report.fusions:
        return replace(report, mode=mode)
    return (fold_ if mode == "fold" else reparametrize_)(model, report, force=force)


def _weight_and_bias(model: nn.Module, fusion: Fusion) -> tuple[Tensor, Tensor | None]:
    layer = layer_of(model, fusion)
    weight = trained_parameter(layer, fusion.parameter).detach().clone()
    bias = layer._parameters.get("bias")
    return weight, None if bias is None else bias.detach().clone()


@contextmanager
def _undone_on_error(model: nn.Module, report: Report) -> Iterator[None]:
    """Every layer that a report names as it was, unless all went well."""
    layers = layers_by_name(model)
    named = [layers[name] for name in (*(f.name for f in report.fusions), *layers_of(report.sums))]
    before = [
        (p, p.detach().clone())
        for m in named
        for p in (*scalable(m), *m._parameters.values())
        if p is not None
    ]
    marks = [(layer, getattr(layer, MARK, None)) for layer in named]
    try:
        yield
    except BaseException:
        for layer in named:
            if hasattr(layer, SCALED):
                bake_(layer)
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
        for layer, mark in marks:
            if mark is None and hasattr(layer, MARK):
                delattr(layer, MARK)
            elif mark is not None:
                setattr(layer, MARK, mark)
        raise
