"""Encoders: any timm backbone with a feature pyramid, in the form segmentation wants it."""

from __future__ import annotations

import difflib
import itertools
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from seglab.models.families import follow_mmsegmentation_, run_twins
from seglab.models.freezing import freeze_, keep_frozen_in_eval_
from seglab.models.recompute import recompute_blocks_
from seglab.models.sizes import crop_padding, pad_to_multiple, side_multiple
from seglab.models.weights import load_backbone, load_pretrained

_PROBE_SIZE = (224, 224)  # which every backbone of any size takes
LEVELS = 4  # fine to coarse; strides 4, 8, 16, 32 for the usual backbone

# Families that MMSegmentation follows with one LayerNorm per output level, and that layer's epsilon
# there. Without it the raw residual stream goes into the head and the scale of its branches is
# another one.
OUTPUT_NORM_EPS = {"swin_": 1e-5, "twins_svt": 1e-5, "convnext": 1e-6}
# What makes a backbone of fixed input size take any size, tried in this order.
ANY_SIZE: tuple[dict[str, bool], ...] = (
    # Swin: windows are shifted in every stage, as MMSegmentation does, however small the stage.
    {"strict_img_size": False, "always_partition": True},
    {"strict_img_size": False},
    {"dynamic_img_size": True},
    {},
)


class Encoder(nn.Module, ABC):
    """Maps a normalized image (B, in_channels, H, W) to features, fine to coarse.

    Attributes:
        in_channels: bands of the image.
        channels: of every level.
        strides: of every level, in pixels of the image.
    """

    in_channels: int = 3
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @abstractmethod
    def forward(self, image: Tensor) -> list[Tensor]:
        """Return one (B, channels[i], H / strides[i], W / strides[i]) for each level."""


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W).

    >>> import torch
    >>> ChannelNorm(3)(torch.rand(1, 3, 2, 2)).sum(1).abs().max() < 1e-5
    tensor(True)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize every pixel's vector of channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TimmEncoder(Encoder):
    """Any timm backbone that yields features, as four levels in NCHW at any input size.

    Args:
        name: timm name, with or without a weights tag: `resnet18`,
            `swin_tiny_patch4_window7_224.ms_in1k`.
        pretrained: load timm's weights for that tag (needs the network once).
        checkpoint_path: `.pth` or `.safetensors` with the whole backbone (only a classifier may be
            absent), instead of timm's weights; names of timm, of the authors or MMSegmentation.
        output_stride: 32, or 16 or 8 by dilation where the family can.
        drop_path: stochastic depth rate, rising linearly to this value at the last block.
        norm_outputs: a LayerNorm on every level, as MMSegmentation has for Swin, Twins and
            ConvNeXt; None decides by family.
        gradient_checkpointing: recompute blocks in the backward pass instead of keeping their
            activations: True everything; "pointwise", for convolutional backbones, only
            normalizations and activations, which costs little time. The numbers stay the same.
        in_channels: bands of the image. Pretrained weights, all made for RGB, are adapted as timm
            does: for one band the first convolution's kernels of red, green and blue are summed;
            for N bands they are repeated in that order (band 3 starts as red again) and multiplied
            by 3 / N, so that equal bands give what grey gave.
        trainable: `all`, `none`, or the number of last stages that are trained. What is frozen
            stays as it is bit by bit: no optimizer holds its weights, and its norms, dropout and
            drop path stay in eval mode.

    Raises:
        ValueError: unknown name or tag, or an option that the family does not have.
        FileNotFoundError: no file at `checkpoint_path`.

    >>> import torch
    >>> encoder = TimmEncoder("resnet18")
    >>> encoder.channels, encoder.strides
    ((64, 128, 256, 512), (4, 8, 16, 32))
    >>> [tuple(x.shape[2:]) for x in encoder(torch.zeros(1, 3, 64, 96))]
    [(16, 24), (8, 12), (4, 6), (2, 3)]
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        checkpoint_path: str | Path | None = None,
        output_stride: int = 32,
        drop_path: float = 0.0,
        norm_outputs: bool | None = None,
        gradient_checkpointing: bool | Literal["pointwise"] = False,
        in_channels: int = 3,
        trainable: Literal["all", "none"] | int = "all",
    ) -> None:
        super().__init__()
        _check_name(name)
        if gradient_checkpointing not in (True, False, "pointwise"):
            raise ValueError(
                "gradient_checkpointing must be true, false or 'pointwise', "
                f"got {gradient_checkpointing!r}"
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1 band, got {in_channels}")
        features = _create_features(name, output_stride, drop_path, in_channels)
        self.in_channels = in_channels
        self.is_getter = hasattr(features, "model")
        # The getter's own model keeps timm's parameter names: `encoder.model.<name in timm>`.
        self.model: Any = features.model if self.is_getter else features
        self.level_indices: Any = getattr(features, "out_indices", None)
        self.channels = tuple(features.feature_info.channels()[-LEVELS:])
        self.strides = tuple(features.feature_info.reduction()[-LEVELS:])
        self.side_multiple = side_multiple(self.model, self.strides[-1])
        self.fixed_size = _fixed_size(name)
        _check_stride(name, self.strides, output_stride)
        self._add_output_norms(name, norm_outputs)
        follow_mmsegmentation_(self.model)
        self.trainable = trainable
        freeze_(self, trainable, self.fixed_size or _PROBE_SIZE)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            recompute_blocks_(self.model, keep_convolutions=gradient_checkpointing == "pointwise")
        if checkpoint_path is not None:
            load_backbone(self, name, Path(checkpoint_path))
        elif pretrained:
            load_pretrained(self, name)

    def train(self, mode: bool = True) -> TimmEncoder:
        """As of any module; what is frozen stays in eval mode."""
        super().train(mode)
        if mode and self.trainable != "all":
            keep_frozen_in_eval_(self)
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map a normalized image (B, C, H, W) to (B, channels[i], h_i, w_i), fine to coarse.

        Raises:
            ValueError: the backbone is one of the few that take a single size, or the image has no
                whole step of the coarsest level and the family cannot do with less.
        """
        padded = pad_to_multiple(image, self.side_multiple)
        may_fail = self.fixed_size is not None or min(padded.shape[-2:]) < self.strides[-1]
        levels = self._extract_or_explain(padded) if may_fail else self._extract(padded)
        if padded.shape != image.shape:
            levels = crop_padding(levels, self.strides, image)
        if self._norms_are_inside():
            return levels
        norms = [getattr(self, name) for name in self.output_norms]
        return [norm(x) for norm, x in zip(norms, levels, strict=True)] if norms else levels

    def _norms_are_inside(self) -> bool:
        """Whether the output norms are part of the trunk, as in MMSegmentation's Twins."""
        return bool(self.output_norms) and type(self.model).__module__ == "timm.models.twins"

    def _extract(self, image: Tensor) -> list[Tensor]:
        if self._norms_are_inside():
            return run_twins(self.model, [getattr(self, name) for name in self.output_norms], image)
        if not self.is_getter:
            return list(self.model(image))[-LEVELS:]
        features = self.model.forward_intermediates(
            image, indices=self.level_indices, output_fmt="NCHW", intermediates_only=True
        )
        return list(features)[-LEVELS:]

    def _extract_or_explain(self, image: Tensor) -> list[Tensor]:
        try:
            return self._extract(image)
        except (AssertionError, RuntimeError) as error:
            height, width = image.shape[-2:]
            if (height, width) == self.fixed_size:
                raise
            family, stride = type(self.model).__name__, self.strides[-1]
            if min(height, width) < stride:
                raise ValueError(
                    f"an image of {height} x {width} pixels is too small for timm's {family}, whose"
                    f" coarsest level has a stride of {stride}: enlarge or pad images to at least"
                    f" {stride} x {stride} (data.eval_scale, seglab.data.transforms.Pad)"
                ) from error
            raise ValueError(
                f"timm's {family} was built for images of {self.fixed_size} and "
                f"cannot take {(height, width)}: use that size or another family"
            ) from error

    def _add_output_norms(self, name: str, wanted: bool | None) -> None:
        own = [eps for family, eps in OUTPUT_NORM_EPS.items() if name.startswith(family)]
        wanted = bool(own) if wanted is None else wanted
        # norm0..norm3 are MMSegmentation's names.
        self.output_norms = [f"norm{i}" for i in range(len(self.channels))] if wanted else []
        for norm, width in zip(self.output_norms, self.channels, strict=False):
            self.add_module(norm, ChannelNorm(width, eps=own[0] if own else 1e-6))


def _check_name(name: str) -> None:
    import timm

    model, _, tag = name.partition(".")
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=5, cutoff=0.5)
        raise ValueError(f"timm has no model {model!r}; nearest: {', '.join(near) or 'none'}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")]
    if tag and tag not in tags:
        raise ValueError(f"timm has no weights {tag!r} for {model}; it has: {', '.join(tags)}")


def _create_features(name: str, output_stride: int, drop_path: float, in_channels: int) -> Any:
    """Build the feature extractor, in getter form where the family has one."""
    asked = {"output_stride": output_stride} if output_stride != 32 else {}
    if in_channels != 3:
        asked["in_chans"] = in_channels
    # Said even if 0, since Swin's own default is 0.1; some families know no stochastic depth.
    rates: list[dict[str, float]] = [{"drop_path_rate": drop_path}]
    if drop_path == 0:
        rates.append({})
    forms: tuple[dict[str, Any], ...] = ({"feature_cls": "getter"}, {})
    failures: list[Exception] = []
    for form, rate, any_size in itertools.product(forms, rates, _any_size_options(name)):
        features = _try_create(name, failures, **asked, **form, **rate, **any_size)
        if features is not None:
            return features
    wish = ", ".join(f"{key}={value}" for key, value in (asked | rates[0]).items() if value)
    raise ValueError(
        f"timm's {name} cannot be built with {wish or 'features'}: {failures[-1]!r}"
    ) from failures[-1]


def _any_size_options(name: str) -> tuple[dict[str, bool], ...]:
    return ANY_SIZE if _fixed_size(name) else ({},)


def _fixed_size(name: str) -> tuple[int, int] | None:
    """Return the size of pretraining for families that may depend on it, None for the others."""
    import timm

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.fixed_input_size:
        return None
    height, width = config.input_size[-2:]
    return int(height), int(width)


def _try_create(name: str, failures: list[Exception], **options: Any) -> Any:
    import timm

    with warnings.catch_warnings():  # deprecated aliases and the like: not the user's doing
        warnings.simplefilter("ignore")
        try:
            return timm.create_model(name, features_only=True, **options)
        except (TypeError, AssertionError, NotImplementedError) as error:
            failures.append(error)  # an option that this family does not know
            return None


def _check_stride(name: str, strides: tuple[int, ...], output_stride: int) -> None:
    if output_stride != 32 and strides[-1] != output_stride:
        raise ValueError(
            f"timm's {name} ignores output_stride={output_stride}: its levels have strides "
            f"{strides}; use 32 or a convolutional family such as resnet or convnext"
        )
