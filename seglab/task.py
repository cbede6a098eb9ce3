"""SegmentationTask: how a network is trained, validated, tested and used; knows no model by name.

One step: uint8 image (B, 3, H, W) -> logits of the decode head and, in training, of auxiliary heads
-> each resized to the label's size -> loss. Evaluation resizes the logits to the label's own
size before the argmax, so that results are those of the original image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss as Loss  # base class of torch's and smp's losses
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from seglab.bounds import check_bounds
from seglab.checkpoints import load_weights, refuse_mismatch
from seglab.extra_metrics import (
    ExtraMetric,
    Predicted,
    build_extra,
    count_extra,
    label,
    label_upsampled,
)
from seglab.inference import Inference
from seglab.lightning_internals import built_by_cli
from seglab.losses import CrossEntropy, refuse_unfit_loss
from seglab.metrics import MeanOverImages, SegmentationMetrics
from seglab.models.segmenter import Network, refuse_other_bands
from seglab.operators.logit_resize import BILINEAR, LogitResize
from seglab.optim import ParameterRules, build_optimizer
from seglab.schedule_end import ScheduleEnd, settle_schedule_end
from seglab.schedule_length import n_optimizer_steps
from seglab.total_batch import count_limits_in_steps, match_total_batch
from seglab.whole_steps import WholeSteps

Batch = Mapping[str, Any]
"""`image` uint8 (B, 3, H, W) RGB, `mask` integer (B, h, w), `name` list of B strings."""
OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

WHOLE_IMAGE = Inference()


class SegmentationTask(LightningModule):
    """Trains a network to label every pixel.

    Args:
        network: Image to logits; normalization is inside.
        num_classes: Number of classes K; linked to the data in configs.
        loss: Called with logits (B, K, h, w) and target (B, h, w) int64; cross-entropy if None. One
            with a method `on_upsampled` is in training given logits of any size by that instead.
        optimizer: Called with the parameters or parameter groups; AdamW at 1e-3 if None.
        scheduler: Called with the optimizer and stepped once per optimizer step. One that has a
            `total_steps` of None is told the length of the training. None keeps the rate constant.
        parameter_rules: Called with the network and the optimizer's learning rate and weight decay,
            returns its parameter groups; None puts all trainable parameters into one.
        auxiliary_weight: Weight of the sum of the auxiliary losses.
        total_batch: Images of one optimizer step over all devices; gradients are accumulated to
            match it, or the run is refused. None leaves accumulation to the trainer.
        inference: Whole image or windows, scales and flips of evaluation.
        eval_precision: "same" evaluates in the precision of training, "32" without autocast.
        extra_metrics: Figures that evaluation adds: "boundary_iou" (`mBoundaryIoU`, per class too;
            Cheng et al. 2021), "calibration" (expected calibration error `ECE`, 15 bins).
        weights: File to initialise the network from before training: a checkpoint of this
            program or the network's own state dict.
        class_names: K names, for tables and logs; numbers if None.
        palette: K RGB colours, for pictures.
        ignore_index: Label that counts nowhere.

    >>> from seglab.models import Segmenter, TimmEncoder
    >>> from seglab.models.heads import FCNHead
    >>> encoder = TimmEncoder("resnet18")
    >>> network = Segmenter(encoder, FCNHead(encoder.channels, num_classes=3, channels=8))
    >>> task = SegmentationTask(network, num_classes=3).eval()
    >>> task(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([1, 3, 32, 32])
    """

    def __init__(
        self,
        network: Network,
        num_classes: int,
        loss: Loss | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        parameter_rules: ParameterRules | None = None,
        auxiliary_weight: float = 0.4,
        total_batch: int | None = None,
        inference: Inference = WHOLE_IMAGE,
        eval_precision: Literal["same", "32"] = "same",
        extra_metrics: Sequence[ExtraMetric] = (),
        weights: str | None = None,
        class_names: Sequence[str] | None = None,
        palette: Sequence[tuple[int, int, int]] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_bounds(model__auxiliary_weight=auxiliary_weight, model__total_batch=total_batch)
        if built_by_cli():
            # The config is plain data; built in Python, the arguments are live objects, which
            # have no place in a checkpoint that is to be read without running code.
            self.save_hyperparameters(logger=False)
        if network.num_classes != num_classes:
            raise ValueError(
                f"the network has {network.num_classes} classes, the data {num_classes}: leave"
                " num_classes out of the network's arguments, it is linked to the data."
            )
        self.network = network
        self.num_classes = num_classes
        self.loss = loss if loss is not None else CrossEntropy(ignore_index)
        refuse_unfit_loss(self.loss, num_classes, ignore_index)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.parameter_rules = parameter_rules
        self.auxiliary_weight = auxiliary_weight
        self.total_batch = total_batch
        self.inference = inference
        self.eval_precision = eval_precision
        self.weights = weights
        self._schedule_end: ScheduleEnd | None = None
        self.scale_equalized = False  # what `weights` says; ScaleEqualizationCallback asks for it
        self.class_names = tuple(class_names or map(str, range(num_classes)))
        self.palette = palette
        self.metrics = nn.ModuleDict(
            {stage: SegmentationMetrics(num_classes, ignore_index) for stage in ("val", "test")}
        )
        self.losses = nn.ModuleDict({stage: MeanOverImages() for stage in ("val", "test")})
        self.extra_metrics = nn.ModuleDict(
            {stage: build_extra(extra_metrics, num_classes) for stage in ("val", "test")}
        )

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W), RGB in 0..255, to logits (B, K, H, W)."""
        logits: Tensor = self.network(image)
        return logits

    def setup(self, stage: str) -> None:
        """Match the total batch; initialise from `weights`, before a checkpoint goes over them."""
        refuse_other_bands(self.network, getattr(self.trainer, "datamodule", None))
        if stage == "fit":
            if self.total_batch is not None:
                match_total_batch(self.trainer, self.total_batch)
            count_limits_in_steps(self.trainer)
        if self.weights is not None:
            self.scale_equalized = load_weights(self.network, self.weights)
            self.weights = None  # once: a second stage of the same process keeps what it learned

    def configure_callbacks(self) -> list[Callback]:
        """Keep validations, checkpoints and random draws in whole optimizer steps."""
        return [WholeSteps()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in one sentence why a checkpoint does not fit, before torch does in forty lines."""
        refuse_mismatch(self.state_dict(), checkpoint["state_dict"], "the checkpoint")
        self.weights = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Decode loss plus weighted auxiliary losses of one batch."""
        target = batch["mask"].long()
        main, *auxiliary = self.network.decode(batch["image"])
        loss = loss_decode = self._loss_of_resized(main, target, BILINEAR)
        losses = {"train/loss_decode": loss_decode}
        if auxiliary:
            parts = [self._loss_of_resized(logits, target, BILINEAR) for logits in auxiliary]
            loss_aux = torch.stack(parts).sum()
            losses["train/loss_aux"] = loss_aux
            loss = loss_decode + self.auxiliary_weight * loss_aux
        # Logged tensors stay on the device until a logger wants a number. With prog_bar=True they
        # would be waited for at every batch; our own progress bar looks them up now and then.
        self.log_dict(losses | {"train/loss": loss}, batch_size=len(target))
        return loss

    def configure_optimizers(self) -> Any:
        """One optimizer; its schedule advances with every optimizer step."""
        factory = self.optimizer or _default_optimizer
        optimizer = build_optimizer(self.network, factory, self.parameter_rules)
        if self.scheduler is None:
            return optimizer
        scheduler: Any = self.scheduler(optimizer)
        self._schedule_end = None
        if hasattr(scheduler, "total_steps"):
            is_given = scheduler.total_steps is not None
            if not is_given:
                scheduler.total_steps = n_optimizer_steps(self.trainer)
            self._schedule_end = ScheduleEnd(scheduler.total_steps, is_given)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Refuse a schedule that a checkpoint brought along and that ends elsewhere."""
        if self._schedule_end is not None:
            settle_schedule_end(self.trainer.lr_scheduler_configs[0].scheduler, self._schedule_end)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Count one batch.

        Returns:
            For callbacks: `prediction` (B, h, w), `losses` (B,) or None, and the counts per image
            of each extra metric, `extra`.
        """
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """As `validation_step`."""
        return self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class ids (B, h, w) at the size of `mask`, the image's original size."""
        return self._prediction_and_loss(batch)[0].ids

    def _evaluate(self, batch: Batch, stage: str) -> dict[str, Any]:
        target = batch["mask"].long()
        extra: Any = self.extra_metrics[stage]
        found, loss = self._prediction_and_loss(batch, with_confidence="calibration" in extra)
        self.metrics[stage].update(found.ids, target)  # type: ignore[operator]
        counts = {kind: count_extra(kind, found, target, self.num_classes) for kind in extra}
        for kind, metric in extra.items():
            metric.update(counts[kind])
        losses = None if loss is None else loss(target)
        if losses is not None:
            self.losses[stage].update(losses)  # type: ignore[operator]
        return {"prediction": found.ids, "losses": losses, "extra": counts}

    def _prediction_and_loss(
        self, batch: Batch, with_confidence: bool = False
    ) -> tuple[Predicted, Callable[[Tensor], Tensor] | None]:
        """Class ids at the label's size, and what maps a target to each image's loss."""
        size = batch["mask"].shape[-2], batch["mask"].shape[-1]
        with self._evaluation_precision():
            if self.network.upsampling is not None and self.inference.is_whole_image:
                resize = LogitResize(self.network.upsampling, tuple(batch["image"].shape[-2:]))
                low = self.network.decode(batch["image"])[0]
                loss = partial(self._loss_of_resized, resize=resize)
                found = label_upsampled(low, size, resize, with_confidence)
                return found, partial(_of_each_image, loss, low.float())
            scores = self.inference(self.network, batch["image"], size)
        # The mean softmax of several views is no logits.
        single = self.inference.n_views == 1
        each = partial(_of_each_image, self.loss, scores.float()) if single else None
        return label(scores, single, with_confidence), each

    def _loss_of_resized(self, logits: Tensor, target: Tensor, resize: LogitResize) -> Tensor:
        on_upsampled = getattr(self.loss, "on_upsampled", None)
        if on_upsampled is None:
            loss: Tensor = self.loss(resize(logits, (target.shape[1], target.shape[2])), target)
        else:  # the same, but never holds the logits at the label's size
            loss = on_upsampled(logits, target, resize)
        return loss

    @contextmanager
    def _evaluation_precision(self) -> Iterator[None]:
        if self.eval_precision == "same":
            yield
            return
        with torch.autocast(self.device.type, enabled=False):
            yield

    def on_validation_epoch_start(self) -> None:
        """Start counting anew; counts of the last validation stay readable until here."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self._reset("test")

    def on_validation_epoch_end(self) -> None:
        """Log `val/mIoU`, `val/mAcc`, ..., `val/IoU/<class>` and the extra metrics' figures."""
        self._log_results("val")

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`, under `test/`."""
        self._log_results("test")

    def _reset(self, stage: str) -> None:
        extra: Any = self.extra_metrics[stage]
        for metric in (self.metrics[stage], self.losses[stage], *extra.values()):
            metric.reset()

    def results(self, stage: str) -> dict[str, Any]:
        """Figures of the last evaluation: floats, and tensors (K,) per class; on every rank."""
        found: dict[str, Any] = self.metrics[stage].compute()  # type: ignore[operator]
        extra: Any = self.extra_metrics[stage]
        for metric in extra.values():
            figures = metric.compute()
            found = found | {k: v.item() if v.ndim == 0 else v for k, v in figures.items()}
        return found

    def _log_results(self, stage: str) -> None:
        results = self.results(stage)
        figures = {f"{stage}/{name}": v for name, v in results.items() if isinstance(v, float)}
        if self.inference.n_views == 1:
            figures[f"{stage}/loss"] = self.losses[stage].compute()  # type: ignore[operator]
        for key in ("IoU", "BoundaryIoU"):
            per_class = results[key].tolist() if key in results else ()
            for name, iou in zip(self.class_names, per_class, strict=False):
                if iou == iou:  # an absent class has no IoU: leave its cell empty
                    figures[f"{stage}/{key}/{name}"] = iou
        # All ranks hold equal values already; sync_dist only tells Lightning so.
        miou = figures.pop(f"{stage}/mIoU")
        self.log(f"{stage}/mIoU", miou, prog_bar=True, sync_dist=True)
        self.log_dict(figures, sync_dist=True)


def _of_each_image(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor
) -> Tensor:
    """Losses (B,) of the images one by one: their mean over a set depends on no batch size."""
    pairs = zip(torch.split(logits, 1), torch.split(target, 1), strict=True)
    return torch.stack([loss(scores, labels) for scores, labels in pairs])


def _default_optimizer(parameters: Iterable[Any]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)
