"""equalize_: find all, measure all, check all, apply all, prove; for plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .centring import require_centrable
from .copies import find_copies, stale_copies
from .eligibility import already_equalized, left_alone
from .finding import DEFAULT_EXCLUDE
from .folding import checked_layers, fold_, with_options
from .fusion import Fusion
from .layers import layer_of, layers_by_name, trained_parameter, unwrap
from .measuring import Measurement, reading
from .options import Mode, Options
from .planning import Plan, Run, copied, first_and_all, make_plan
from .proving import Explicit, explicit_form, require_equal, require_proportional
from .ranks import gather, together
from .reparametrization import reparametrize_
from .report import Report
from .sums.scaling import layers_of


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
    options = Options(
        mode=mode,
        tolerance=tolerance,
        max_batches=max_batches,
        include=include,
        exclude=exclude,
        center=center,
        preserve_norm=preserve_norm,
        placebo=placebo,
        sums=sums,
        force=force,
    )
    return equalize_as(model, batches, options, forward, fusions, progress)


def equalize_as(
    model: nn.Module,
    batches: Iterable[Any],
    options: Options,
    forward: Run | None = None,
    fusions: Sequence[Fusion] | None = None,
    progress: Callable[[int], Any] | None = None,
    trained: str = "",
) -> Report:
    """`equalize_` with checked options: find all, measure all, check all, apply all, prove.

    `trained` says how it is known that the weights were trained, if it is.
    """
    model = unwrap(model)
    with reading(model, batches):
        first, stream = first_and_all(batches)
        plan = make_plan(model, first, options, forward, fusions)
        plan.require_something()
        if options.mode != "off":
            plan = plan.without(left_alone(model, plan.fusions, options.force, trained))
            if trained and not options.force:
                plan = replace(plan, sums=())
        if not plan.fusions and not plan.sums:
            return Report((), (), refusals=plan.findings.refusals, mode=options.mode)
        measurement = Measurement(model, plan, options, progress)
        report = measurement.report(first, stream, batches)
        if options.mode != "off" and not options.force:
            equalized = already_equalized(model, report)
            plan, report = plan.without(equalized), report.without(equalized)
        report = with_options(model, report, options)
        if options.mode == "off" or not (report.fusions or report.sums):
            return replace(report, mode=options.mode)
        return _apply_and_prove(model, plan, report, options, measurement.last)


def _apply_and_prove(
    model: nn.Module, plan: Plan, report: Report, options: Options, last: Sequence[Any]
) -> Report:
    """Change the weights, compare with the explicit form on a batch, or change nothing at all."""
    originals = {f.name: _weight_and_bias(model, f) for f in report.fusions}
    copies = find_copies(model)

    def forward() -> Any:
        return plan.run(model, copied(last[0]))

    def explicit() -> Any:
        if report.fusions:
            checked_layers(model, report, options.force)
        if not last:
            return None
        if report.fusions:
            evidence = require_proportional(model, plan, forward)
            if report.center:
                require_centrable(model, plan, evidence, forward)
        return explicit_form(model, plan, report, forward)

    expected = together(explicit)
    with _undone_on_error(model, report):
        done = together(lambda: _apply(model, report, options))
        if expected is not None:
            together(lambda: require_equal(model, plan, report, expected, originals, forward))
        else:
            together(lambda: None)
    more = (*_unproved(report, expected), *stale_copies(model, report.fusions, copies))
    return replace(done, notes=(*done.notes, *more))


def _unproved(report: Report, expected: Explicit | None) -> list[str]:
    """A remark on the fusions that ran on no rank's batch of the proof."""
    reached = set[str]().union(*gather(expected.reached if expected else set[str]()))
    names = [fusion.name for fusion in report.fusions if fusion.name not in reached]
    reason = "no batch runs all fusions; not proved on real values, since the last that runs most"
    return [f"{reason} does not run them: {', '.join(names)}"] if names else []


def _apply(model: nn.Module, report: Report, options: Options) -> Report:
    change = fold_ if options.mode == "fold" else reparametrize_
    return change(model, report, force=options.force)


def _weight_and_bias(model: nn.Module, fusion: Fusion) -> tuple[Tensor, Tensor | None]:
    layer = layer_of(model, fusion)
    weight = trained_parameter(layer, fusion.parameter).detach().clone()
    bias = layer._parameters.get("bias")
    return weight, None if bias is None else bias.detach().clone()


@contextmanager
def _undone_on_error(model: nn.Module, report: Report) -> Iterator[None]:
    """Every layer that a report names as it was, unless all went well."""
    layers = layers_by_name(model)
    names = {*(fusion.name for fusion in report.fusions), *layers_of(report.sums)}
    before = [(layer, type(layer), dict(vars(layer))) for layer in map(layers.__getitem__, names)]
    parameters = {p for layer, _, _ in before for p in layer._parameters.values() if p is not None}
    values = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        yield
    except BaseException:
        for layer, kind, own in before:
            layer.__class__ = kind
            vars(layer).clear()
            vars(layer).update(own)
        with torch.no_grad():
            for parameter, old in values:
                parameter.copy_(old)
        raise
