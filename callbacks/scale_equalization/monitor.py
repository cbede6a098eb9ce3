"""ScaleMonitor: does the equilibrium hold during training?

Every n steps one extra forward pass of the batch at hand, without gradients and without a trace,
measures the branches; the gradients are read where the optimizer is about to use them. Comparing
runs with and without equalization shows the paper's Proposition 3.1: gradients of a slice follow
the scale of its branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import ref

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from .batches import run_network
from .equivalence import require_lr_ratios
from .finding import DEFAULT_EXCLUDE, examine, require_fusions, watching
from .finding.calls import Call
from .folding import channel_factor
from .fusion import Fusion
from .layers import trained_weight, unwrap, used_weight
from .statistics import Moments


class ScaleMonitor(Callback):
    """Log, for each branch of each fusion, how much it weighs in the fused map.

    Under ``scale_monitor/<fusion>/<branch>/``:

    - ``std``: standard deviation of the branch just before the concatenation, over this batch;
    - ``share``: variance of what the branch's slice adds to the output, divided by the sum of
      these variances over the branches (covariances between branches are left out);
    - ``gradient``: root mean square of the gradient of the slice's weights;
    - ``update``: norm of the slice's change in the optimizer step, divided by its norm before; of
      the weight that the layer uses, in mode "reparametrize" too.

    Numbers are those of rank 0's batch, over all runs of a layer that runs several times in it.
    Gradients are read when the optimizer that trains the slice next steps, the update when it has,
    and both are logged at the step of the measurement.

    Args:
        every_n_steps: Optimizer steps between two measurements; several batches that are
            accumulated for one step are measured once.
        include: Shell patterns of the consumers' names to watch.
        exclude: Shell patterns to leave out; by default the encoder.
        forward: Called as ``forward(pl_module, batch)`` in place of ``pl_module(input)``, with the
            input found as by `ScaleEqualizationCallback`.
        missing_ok: Log nothing, instead of an error, where a network has no fusion.

    Attributes:
        fusions: The fusions watched; found anew whenever another network is measured.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        forward: Callable[[Any, Any], Any] | None = None,
        missing_ok: bool = False,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, but must be at least 1")
        self.every_n_steps = every_n_steps
        self.include, self.exclude, self.forward = tuple(include), tuple(exclude), forward
        self.missing_ok = missing_ok
        self.fusions: tuple[Fusion, ...] = ()
        self._network: ref[nn.Module] | None = None
        self._last_step: int | None = None
        self._awaited: set[str] = set()  # fusions whose gradients are still to be read
        self._before: dict[str, Tensor] = {}  # their weights before the step that is due

    def __getstate__(self) -> dict[str, Any]:
        """Everything but which network was watched: it is found anew."""
        return {**self.__dict__, "_network": None, "_before": {}}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count steps; the network may have changed since the last fit."""
        self._network = self._last_step = None
        self._awaited, self._before = set(), {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the branches on this batch, if it is time."""
        step = trainer.global_step
        if self._last_step is not None and step < self._last_step + self.every_n_steps:
            return
        self._last_step = step
        with trainer.precision_plugin.forward_context():
            self._log(trainer, self.measure(pl_module, batch), step)
        self._awaited = {fusion.name for fusion in self.fusions}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Read the gradients of those slices that this optimizer trains, once for each measurement.

        With several optimizers the others' gradients are still those of the batch before.
        """
        require_lr_ratios(optimizer.param_groups)
        if not self._awaited or self._last_step is None:
            return
        trained = {
            id(getattr(p, "whole", p)) for group in optimizer.param_groups for p in group["params"]
        }
        network = unwrap(pl_module)
        due = {f.name for f in self.fusions if id(trained_weight(network, f)) in trained}
        due &= self._awaited
        self._awaited -= due
        values = self.gradients(pl_module)
        keep = tuple(f"scale_monitor/{name}/" for name in due)
        self._log(trainer, {k: v for k, v in values.items() if k.startswith(keep)}, self._last_step)
        self._before |= {
            f.name: used_weight(network, f).clone() for f in self.fusions if f.name in due
        }

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Compare the slices that an optimizer has stepped with what they were before."""
        if self._before and self._last_step is not None:
            before, self._before = self._before, {}
            self._log(trainer, self.updates(pl_module, before), self._last_step)

    def measure(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Standard deviation and share of every branch for one batch; changes nothing."""
        model = unwrap(model)

        def run() -> Any:
            return run_network(model, batch, self.forward)

        if self._network is None or self._network() is not model:
            found = examine(model, run, include=self.include, exclude=self.exclude)
            if not self.missing_ok:
                require_fusions(found)
            self.fusions, self._network = found.fusions, ref(model)
        notes = _Notes()
        with watching(model, self.fusions, notes.consume):
            run()
        return notes.values()

    def gradients(self, model: nn.Module) -> dict[str, float]:
        """Root mean square of the gradient of every branch's slice."""
        values = {}
        for fusion in self.fusions:
            gradient = trained_weight(model, fusion).grad
            if gradient is None:
                continue
            squares = gradient.detach().double().square()
            for index, mask in enumerate(_masks(fusion)):
                mask = mask.to(squares.device).expand(squares.shape)
                mean = (squares * mask).sum() / mask.sum()
                values[_key(fusion, index, "gradient")] = float(mean.sqrt())
        return values

    def updates(self, model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, float]:
        """Norm of every slice's change, relative to its norm before.

        Args:
            model: After the step.
            before: The fusions' weights as they were, by the fusions' names.
        """
        network, values = unwrap(model), {}
        for fusion in self.fusions:
            old = before.get(fusion.name)
            if old is None:
                continue
            old = old.double()
            change = (used_weight(network, fusion).double() - old).square()
            for index, mask in enumerate(_masks(fusion)):
                mask = mask.to(old.device).expand(old.shape)
                size, step = (old.square() * mask).sum(), (change * mask).sum()
                if size > 0:  # a slice of zeros has no relative change
                    values[_key(fusion, index, "update")] = float((step / size).sqrt())
        return values

    def _log(self, trainer: Trainer, values: dict[str, float], step: int) -> None:
        if values and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=step)


class _Notes:
    """Listens at the consumers: the branches' deviations and shares of one forward pass.

    A layer that runs several times in it (a head shared by levels) is pooled over its runs.
    """

    def __init__(self) -> None:
        self.moments: dict[str, tuple[Fusion, list[tuple[Moments, Moments]]]] = {}

    def consume(self, fusion: Fusion, call: Call) -> None:
        blank = [(Moments(), Moments()) for _ in fusion.branches]
        _, moments = self.moments.setdefault(fusion.name, (fusion, blank))
        for index, (branch, mask) in enumerate(zip(fusion.branches, _masks(fusion), strict=True)):
            slice_ = call.values.narrow(call.dim, branch.start, branch.width)
            moments[index][0].update(slice_)
            alone = call.weight * mask.to(call.weight.device, call.weight.dtype)
            moments[index][1].update(call.respond(alone))

    def values(self) -> dict[str, float]:
        found = {}
        for fusion, moments in self.moments.values():
            total = sum(response.variance for _, response in moments) or 1.0
            for index, (branch, response) in enumerate(moments):
                found[_key(fusion, index, "std")] = branch.std
                found[_key(fusion, index, "share")] = response.variance / total
        return found


def _masks(fusion: Fusion) -> list[Tensor]:
    """For each branch, 1 on its slice of the weight and 0 elsewhere; broadcasts to the weight."""
    n = len(fusion.branches)
    return [channel_factor(fusion, [float(i == j) for j in range(n)]) for i in range(n)]


def _key(fusion: Fusion, index: int, what: str) -> str:
    return f"scale_monitor/{fusion.name}/{index}/{what}"
