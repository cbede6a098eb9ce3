"""From measured summands to the report, and to changed producers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scale_equalization.fusion import AlreadyEqualizedError, ScaleEqualizationError
from scale_equalization.layers import (
    is_equalized,
    layers_by_name,
    mark_equalized,
    multiplied,
    trained_parameter,
)
from scale_equalization.report import Summand, SumMeasure
from scale_equalization.statistics import Moments, varying_std

from .edges import EDGES
from .pairs import SumFusion, balance


def describe_sums(fusions: Sequence[SumFusion], states: Tensor) -> tuple[SumMeasure, ...]:
    """Measures of all sums from the moments of their summands, (summands, 3)."""
    measures = []
    states, done = states.cpu(), 0
    for fusion in fusions:
        rows = states[done : done + len(fusion.sources)]
        done += len(rows)
        each = [Moments.from_state(row) for row in rows]
        if not bool(torch.isfinite(rows).all()):
            raise ScaleEqualizationError(
                f"a summand of the {fusion.name} is not finite: look for the NaN in the data"
            )
        factors = balance(fusion, [varying_std(moments) for moments in each])
        summands = tuple(
            Summand(source, producer, moments.mean, moments.std, factor, moments.count)
            for source, producer, moments, factor in zip(
                fusion.sources, fusion.producers, each, factors, strict=True
            )
        )
        measures.append(SumMeasure(fusion.location[0], summands, fusion.weights))
    return tuple(measures)


def producers_of(measures: Sequence[SumMeasure]) -> dict[str, float]:
    """The modules to be scaled, each with its factor."""
    summands = [summand for measure in measures for summand in measure.summands]
    return {s.producer: s.scale for s in summands if s.producer and s.scale != 1.0}


def layers_of(measures: Sequence[SumMeasure]) -> list[str]:
    """The modules that are changed: producers, and those with edge weights."""
    return [*producers_of(measures), *(m.name for m in measures if m.weights)]


def checked_sums(model: nn.Module, measures: Sequence[SumMeasure], force: bool) -> None:
    """An error, before anything is changed, if a layer is missing or was scaled before."""
    layers = layers_by_name(model)
    for name in layers_of(measures):
        if name not in layers:
            raise ScaleEqualizationError(f"{name} is not in this network: the report is another's")
        if is_equalized(layers[name]) and not force:
            raise AlreadyEqualizedError(
                f"{name}, whose output is added, is equalized already; scale equalization is an "
                "initialization. Build the network afresh, or pass force=True if you mean it"
            )


def scale_sums_(model: nn.Module, measures: Sequence[SumMeasure]) -> None:
    """Multiply weight and bias of every producer, and all edge weights."""
    layers = layers_by_name(model)
    with torch.no_grad():
        for name, factor in producers_of(measures).items():
            mark_equalized(layers[name], "fold", scalable(layers[name]))
            for values in scalable(layers[name]):
                values.copy_(multiplied(values, torch.tensor(factor, dtype=torch.float64)))
        for measure in measures:
            if measure.weights:
                weights = trained_parameter(layers[measure.name], EDGES)
                mark_equalized(layers[measure.name], "fold", [weights])
                scales = [summand.scale for summand in measure.summands]
                factors = torch.tensor(scales, dtype=torch.float64)
                weights.copy_(multiplied(weights, factors))


def scalable(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters by which a layer's output is scaled."""
    found = (layer._parameters.get(name) for name in ("weight", "bias"))
    return [values for values in found if values is not None]
