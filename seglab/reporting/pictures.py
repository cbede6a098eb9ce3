"""A picture of what the network sees at each validation: image, label, prediction."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from seglab.captions import Sample, captioned_grid
from seglab.image_scores import count_images, figures
from seglab.visualize import Pixels, as_rgb, color_table, save_picture


class PictureGrid(Callback):
    """Saves a grid under `<log folder>/pictures` and hands it to the loggers.

    The rows are validation images of rank 0 and of the first loader, one drawn from each of `count`
    equal parts of the set, and the same at every validation; each has its name and its own mIoU.
    Of a set without a length they are the first. Colours come from the task's `palette`.

    Args:
        count: Rows of the grid; 0 saves nothing.
        side: Longest side of a cell in pixels.
        seed: Of the draw.
    """

    def __init__(self, count: int = 4, side: int = 256, seed: int = 0) -> None:
        self.count = count
        self.side = side
        self.seed = seed
        self.folder: Path | None = None  # where the last grid went
        self._places: dict[int, list[int]] = {}  # in which batch, and where there
        self._samples: list[Sample] = []
        self._loaded_step = 0

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the step down: Lightning counts none when it only evaluates."""
        self._loaded_step = int(checkpoint.get("global_step", 0))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep some images and what was made of them."""
        if not trainer.is_global_zero or trainer.sanity_checking or dataloader_idx:
            return
        if batch_idx == 0:
            n_batches, n_first = trainer.num_val_batches[0], len(batch["mask"])
            self._samples = []
            self._places = draw_places(n_batches, n_first, self.count, self.seed)
        for place in fit_places(self._places.get(batch_idx, []), len(batch["mask"])):
            self._samples.append(_sample(batch, outputs["prediction"], place, pl_module))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the grid."""
        samples, self._samples = self._samples, []
        if not trainer.loggers or getattr(trainer, "fast_dev_run", False):
            return  # nowhere to keep it
        log_dir = trainer.log_dir  # a broadcast: every rank must ask
        if not samples or log_dir is None:
            return
        task: Any = pl_module
        colors = color_table(task.palette, task.num_classes)
        step = trainer.global_step or self._loaded_step
        title = f"after {step} steps: image, label, prediction"
        picture = captioned_grid(samples, colors, task.class_names, self.side, title)
        self.folder = Path(log_dir, "pictures")
        save_picture(self.folder / f"step_{step:07d}.png", picture)
        for logger in trainer.loggers:
            send_picture(logger, picture, step)


def draw_places(
    n_batches: float, batch_size: int, count: int, seed: int = 0
) -> dict[int, list[int]]:
    """Draw one image from each of `count` equal parts of a set.

    Args:
        n_batches: Of the set; the first images are taken if it is infinite.
        batch_size: Images of a batch.
        count: How many images.
        seed: Of the draw.

    Returns:
        For each batch that has any, the places in it.

    >>> draw_places(100, 1, 4, seed=0)
    {21: [0], 40: [0], 62: [0], 81: [0]}
    """
    endless = not isfinite(n_batches)
    total = count if endless else int(n_batches) * batch_size
    edges = np.linspace(0, total, min(count, total) + 1).astype(int)
    random = np.random.default_rng(seed)
    places: dict[int, list[int]] = {}
    for low, high in pairwise(edges.tolist()):
        batch, place = divmod(int(random.integers(low, high)), batch_size)
        places.setdefault(batch, []).append(place)
    return places


def fit_places(places: Sequence[int], n_images: int) -> list[int]:
    """Move places into a batch that is shorter than the first; none is taken twice.

    >>> fit_places([1, 3], n_images=2)
    [1, 0]
    """
    found: list[int] = []
    for place in places:
        turned = [(place + step) % n_images for step in range(n_images)]
        found += [free for free in turned if free not in found][:1]
    return found


def _sample(batch: Mapping[str, Any], prediction: Tensor, place: int, task: Any) -> Sample:
    label, found = batch["mask"][place].cpu(), prediction[place].cpu()
    score = figures(count_images(found[None], label[None], task.num_classes))["mIoU"][0]
    names = batch.get("name")
    name = f"image {place}" if names is None else str(names[place])
    return Sample(
        name, to_picture(batch["image"][place]), to_mask(label), to_mask(found), float(score)
    )


def to_picture(image: Tensor) -> Pixels:
    """An image (C, H, W) in 0..255 on any device to uint8 RGB (H, W, 3)."""
    return as_rgb(image.permute(1, 2, 0).cpu().numpy())


def to_mask(ids: Tensor) -> Pixels:
    """Class ids (H, W) on any device to a uint8 array; ids above 255 end as 255."""
    return ids.clamp(max=255).cpu().numpy().astype(np.uint8)


def send_picture(logger: Any, picture: Pixels, step: int, name: str = "pictures") -> None:
    """Hand a picture to a logger in the logger's own way; files have it already.

    Args:
        logger: TensorBoard, W&B, MLflow and Comet show pictures; of others, those that have
            Lightning's method `log_image(key, images, step)`. The rest is passed over.
        picture: RGB (H, W, 3) uint8.
        step: Of the validation.
        name: Under which the logger shows it.
    """
    from lightning.pytorch.loggers import CometLogger, MLFlowLogger, TensorBoardLogger

    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    elif isinstance(logger, MLFlowLogger):
        file = f"{name}/step_{step:07d}.png"
        logger.experiment.log_image(logger.run_id, picture, artifact_file=file)
    elif isinstance(logger, CometLogger):
        logger.experiment.log_image(picture, name=name, step=step)
    elif callable(getattr(logger, "log_image", None)):  # W&B's, and what others took over
        logger.log_image(name, [picture], step)
