"""What a run says when it ends: the per-class table and where its files are."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from seglab.reporting.pictures import PictureGrid


class ResultsPrinter(Callback):
    """Prints the per-class table, and after `fit` the paths of what was written."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print when all else is done, the progress bar included."""
        log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: every rank must ask
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        when = f" after {trainer.global_step} steps" if stage == "fit" else ""
        _print_table(pl_module, "test" if stage == "test" else "val", when)
        for name, path in _written(trainer):
            print(f"{name:<16} {path}")
        if log_dir is not None:
            print(f"{'logs':<16} {log_dir}")


def _print_table(task: Any, stage: str, when: str) -> None:
    metrics = task.metrics[stage]
    # The results were gathered from all ranks when they were logged; only their cache is read.
    if metrics.update_called:
        print(f"\n{stage}{when}, in percent")
        print(metrics.table(task.class_names), end="\n\n")


def _written(trainer: Trainer) -> list[tuple[str, str | Path]]:
    found: list[tuple[str, str | Path]] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            if callback.best_model_score is not None:
                found.append((f"best {callback.monitor}", f"{callback.best_model_score:.4f}"))
            kind = "last" if callback.monitor is None else "best"
            found.append((f"{kind} checkpoint", callback.best_model_path))
        if isinstance(callback, PictureGrid) and callback.folder is not None:
            found.append(("pictures", callback.folder))
    return found
