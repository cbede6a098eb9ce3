"""What a run costs: seconds, images per second, memory; and on which machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sized
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

PACKAGES = ("seglab", "scale-equalization", "torch", "lightning", "timm", "albumentations", "numpy")


class Costs(Callback):
    """Counts images and wall-clock seconds of training and of evaluation, over all ranks.

    Loading and warm-up are inside, validations outside the time of training. A run that is
    continued goes on counting from its checkpoint.
    """

    def __init__(self) -> None:
        self.counted = {"train_images": 0, "train_seconds": 0.0}
        self.counted |= {"eval_images": 0, "eval_seconds": 0.0}
        self._n_evaluated = 0  # in this evaluation, of this rank
        self._since = 0.0  # when training or evaluation last began or went on
        self._stage = "fit"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the stage down."""
        self._stage = stage

    def state_dict(self) -> dict[str, Any]:
        """What has been counted."""
        return dict(self.counted)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; an evaluation counts for itself."""
        if self._stage == "fit":
            self.counted |= state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count a batch, and the time until now: what a checkpoint is to keep."""
        self.counted["train_images"] += trainer.world_size * len(batch["image"])
        self._pass("train_seconds")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of training."""
        _wait_for_device(trainer)
        self._pass("train_seconds")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let what came before count as training, the steps that the device still has to do too."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            _wait_for_device(trainer)
            self._pass("train_seconds")
        self._n_evaluated = 0
        self._since = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count a batch."""
        if not trainer.sanity_checking:
            self._n_evaluated += len(batch["image"])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of evaluation."""
        if not trainer.sanity_checking:
            _wait_for_device(trainer)
            self._pass("eval_seconds")
            # Ranks hold an image more or less: no padding is evaluated.
            n_images = torch.tensor(self._n_evaluated, device=trainer.strategy.root_device)
            self.counted["eval_images"] += int(trainer.strategy.reduce(n_images, reduce_op="sum"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let training go on; pictures and files in between count as neither."""
        self._since = time.perf_counter()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_validation_start`."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """As `on_validation_batch_end`."""
        self.on_validation_batch_end(trainer, pl_module, *args)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_validation_epoch_end`."""
        self.on_validation_epoch_end(trainer, pl_module)

    def _pass(self, name: str) -> None:
        now = time.perf_counter()
        self.counted[name] += now - self._since
        self._since = now

    def figures(self) -> dict[str, Any]:
        """What was counted, with images per second, and the peak of memory of this process.

        `peak_memory_bytes` is what PyTorch held on the GPU, `peak_process_bytes` the whole process
        in main memory, worker processes not included.
        """
        found: dict[str, Any] = {key: value for key, value in self.counted.items() if value}
        for part in ("train", "eval"):
            seconds = self.counted[f"{part}_seconds"]
            if seconds and self.counted[f"{part}_images"]:
                rate = self.counted[f"{part}_images"] / seconds
                found[f"{part}_images_per_second"] = rate
        if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
            found["peak_memory_bytes"] = peak
        peak = _peak_of_process()
        return found | ({"peak_process_bytes": peak} if peak else {})


def _wait_for_device(trainer: Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()


def _peak_of_process() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(trainer: Trainer) -> dict[str, Any]:
    """Versions, device and precision of a run."""
    device = trainer.strategy.root_device
    on_cuda = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **({"cuda": torch.version.cuda} if on_cuda else {}),
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # used from its folder
        return ""


def _processor() -> str:
    """The CPU's own name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def data_facts(trainer: Trainer) -> dict[str, Any]:
    """Data module and the number of images of each split that has been set up."""
    data: Any = getattr(trainer, "datamodule", None)
    if data is None:
        return {}
    found: dict[str, Any] = {"module": type(data).__name__}
    for split in ("train", "val", "test"):
        dataset = vars(data).get(f"{split}_dataset")
        if isinstance(dataset, Sized):
            found[f"{split}_images"] = len(dataset)
    return found
