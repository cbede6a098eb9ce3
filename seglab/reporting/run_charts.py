"""Charts while a run goes on: scales of its fusions, IoU of each class over the steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from seglab.reporting import charts
from seglab.reporting.file_names import SCALE_REPORT
from seglab.reporting.pictures import send_picture
from seglab.visualize import save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunCharts(Callback):
    """Draws `pictures/scales.png` and `pictures/class_iou.png` and hands them to the loggers.

    The first is drawn when training starts, if the folder has a `scale_equalization.json`; the
    second, from the second validation on, over all validations of the run, those before an
    interruption included. Matplotlib draws them; without it there are none, and `remark` says so.
    """

    def __init__(self) -> None:
        self.remark = ""
        self._steps: list[int] = []
        self._iou: list[list[float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The validations so far."""
        return {"steps": self._steps, "iou": self._iou}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after them."""
        self._steps, self._iou = list(state_dict["steps"]), list(state_dict["iou"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the scales."""
        folder = _folder(trainer)
        report = folder / SCALE_REPORT if folder else None
        if folder is None or report is None or not report.is_file():
            return
        rows = charts.scale_rows(json.loads(report.read_text(encoding="utf-8")))
        if rows and self._can_draw():
            self._publish(trainer, folder, "scales", charts.scale_bars(rows))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the classes."""
        folder = _folder(trainer)
        if folder is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        task: Any = pl_module
        self._add(trainer.global_step, task.metrics["val"].compute()["IoU"].tolist())
        if len(self._steps) > 1 and self._can_draw():
            figure = charts.class_lines(self._steps, self._iou, task.class_names)
            self._publish(trainer, folder, "class_iou", figure)

    def _add(self, step: int, iou: list[float]) -> None:
        if self._steps and self._steps[-1] == step:  # a resumed run repeats a validation
            self._steps.pop()
            self._iou.pop()
        self._steps.append(step)
        self._iou.append(iou)

    def _can_draw(self) -> bool:
        if not charts.is_available():
            self.remark = f"not drawn: {charts.MISSING}"
        return not self.remark

    def _publish(self, trainer: Trainer, folder: Path, name: str, figure: Figure) -> None:
        picture = charts.to_pixels(figure)
        save_picture(folder / "pictures" / f"{name}.png", picture)
        for logger in trainer.loggers:
            send_picture(logger, picture, trainer.global_step, name=f"charts/{name}")


def _folder(trainer: Trainer) -> Path | None:
    """Where rank 0 keeps the run's files; None elsewhere and where nothing is kept."""
    log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: every rank must ask
    keeps = trainer.is_global_zero and log_dir and not getattr(trainer, "fast_dev_run", False)
    return Path(str(log_dir)) if keeps else None
