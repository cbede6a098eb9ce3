"""ExplicitEqualization: the branches divided by their std in every pass, as the paper's Eq. 9.

The reference that folding and reparametrizing stand for: the trained weight is that of the layer
behind the division, so its gradients see branches of one scale. The division happens in the
layer's input, or, where a layer takes the list of its branches, in each of them before it is
resized, which is the same. Means are left alone, as by folding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


class ExplicitEqualization(Callback):
    """Divides each branch of each fusion by the std that `ScaleEqualizationCallback` measured.

    That one has to run with mode="off". In checkpoints, and in the network after the fit, the
    weights hold the division; resuming, and fitting the same network again, take it out of them.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._factors: dict[str, Tensor] = {}  # by the weight's key in a state dict
        self._folded: dict[str, Tensor] = {}  # those that weights hold, before training starts
        self._holder: LightningModule | None = None  # of these weights; None: what is resumed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the layers; every callback's `on_fit_start` is done."""
        report = _report_of(trainer)
        self._unhook()  # of a fit that was interrupted
        if self._holder in (None, pl_module):
            _multiply(pl_module, {key: 1 / factor for key, factor in self._folded.items()})
        self._factors, self._folded, self._holder = {}, {}, None
        for fusion in report.fusions:
            layer = pl_module.get_submodule(fusion.name)
            if not isinstance(layer, LAYERS):
                raise ValueError(
                    f"{fusion.name} is a {type(layer).__name__}, whose input is not known to be its"
                    " branches: leave it out by scale_equalization.exclude, or the arm explicit"
                )
            line = _line(fusion, report.scales(fusion))
            self._handles.append(layer.register_forward_pre_hook(_Divide(fusion.name, line)))
            self._factors[f"{fusion.name}.{fusion.parameter}"] = _as_weight(fusion, line)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Fold the division into the checkpoint's weights, since nothing else would divide."""
        for key, factor in self._factors.items():
            weight = checkpoint["state_dict"][key]
            checkpoint["state_dict"][key] = weight * factor.to(weight)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold the division into the weights, and take the hooks off."""
        self._unhook()
        _multiply(pl_module, self._factors)
        self._folded, self._holder, self._factors = self._factors, pl_module, {}

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint's weights hold."""
        return {"folded": self._factors or self._folded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it: the next fit starts from these weights."""
        self._folded, self._holder = state_dict["folded"], None


@torch.no_grad()
def _multiply(network: nn.Module, factors: Mapping[str, Tensor]) -> None:
    state = network.state_dict()  # shares its memory
    for key, factor in factors.items():
        state[key].mul_(factor.to(state[key]))


class _Divide:
    """A forward pre-hook.

    Args:
        name: Of the layer, for messages.
        line: What each input channel is multiplied by, (C,) float64.
    """

    def __init__(self, name: str, line: Tensor) -> None:
        self.name, self.line = name, line

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        first, *rest = args
        is_one = isinstance(first, Tensor)
        branches: Sequence[Tensor] = [first] if is_one else list(first)
        dim = -1 if isinstance(layer, nn.Linear) else 1
        widths = [branch.shape[dim] for branch in branches]
        if sum(widths) != len(self.line):
            raise ValueError(
                f"{self.name} takes {len(self.line)} channels, its input has {widths}: its branches"
                " cannot be divided one by one; leave out the arm explicit"
            )
        parts = torch.split(self.line, widths)
        divided = [_times(x, part, dim) for x, part in zip(branches, parts, strict=True)]
        return (divided[0] if is_one else divided, *rest)


def _times(x: Tensor, line: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return x * line.to(x.device, x.dtype).view(shape)


def _report_of(trainer: Trainer) -> Any:
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    reports = [c.report for c in callbacks if hasattr(c, "report") and hasattr(c, "equalize")]
    if not reports or reports[0] is None or reports[0].mode != "off":
        raise ValueError(
            "the explicit equalizer divides what scale_equalization measures with mode off: set"
            " scale_equalization.mode to off, and leave the section in"
        )
    if reports[0].sums:
        raise ValueError("the arm explicit has no form for sums: leave out it, or sums")
    return reports[0]


def _line(fusion: Any, scales: Sequence[float]) -> Tensor:
    pairs = zip(fusion.branches, scales, strict=True)
    return torch.cat([torch.full((b.width,), s, dtype=torch.float64) for b, s in pairs])


def _as_weight(fusion: Any, line: Tensor) -> Tensor:
    """The factors of the input channels, laid out to multiply the weight."""
    tail = (1,) * (len(fusion.weight_shape) - 2)
    if fusion.transposed:  # (in, out / groups, ...)
        return line.view(-1, 1, *tail)
    rows = fusion.weight_shape[0] // fusion.groups  # (out, in / groups, ...)
    grouped = line.view(fusion.groups, -1).repeat_interleave(rows, 0)
    return grouped.view(*grouped.shape, *tail)
