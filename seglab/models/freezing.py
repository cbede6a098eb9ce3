"""Freeze an encoder or its first stages: neither weights nor statistics of norms move."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

Trainable = Literal["all", "none"] | int
"""`all`, `none`, or the number of last stages that are trained."""


def freeze_(encoder: nn.Module, trainable: Trainable, size: tuple[int, int]) -> None:
    """Freeze the parameters that the first levels of an encoder depend on, in place.

    A parameter belongs to the first level whose features depend on it, which is found out by
    differentiating (on the meta device: nothing is computed), so it holds for any family.

    Args:
        encoder: maps an image to a list of levels, fine to coarse; knows its `in_channels`.
        trainable: what is left trainable.
        size: height and width that the encoder can take.

    Raises:
        ValueError: a number of stages that the encoder does not have, or a family whose levels
            cannot be told apart.

    >>> from seglab.models import TimmEncoder
    >>> encoder = TimmEncoder("resnet18", trainable=1)
    >>> sorted({name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad})
    ['layer4']
    """
    if trainable == "all":
        return
    frozen = set(dict(encoder.named_parameters()))
    if trainable != "none":
        frozen = _of_first_levels(encoder, trainable, size)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name not in frozen)
    keep_frozen_in_eval_(encoder)


def _of_first_levels(encoder: nn.Module, n_trained: int, size: tuple[int, int]) -> set[str]:
    """Names of the parameters that all levels but the last `n_trained` depend on."""
    on_meta = copy.deepcopy(encoder).to("meta").eval()
    parameters = dict(on_meta.named_parameters())
    image = torch.zeros(1, getattr(encoder, "in_channels", 3), *size, device="meta")
    levels = on_meta(image)
    is_number = isinstance(n_trained, int) and not isinstance(n_trained, bool)
    if not is_number or not 0 < n_trained <= len(levels):
        raise ValueError(
            f"trainable must be all, none or the number of last stages, 1 to {len(levels)}; got "
            f"{n_trained!r}"
        )
    frozen: set[str] = set()
    for level in levels[: len(levels) - n_trained]:
        gradients = torch.autograd.grad(
            level.sum(), [*parameters.values()], retain_graph=True, allow_unused=True
        )
        pairs = zip(parameters, gradients, strict=True)
        frozen |= {name for name, gradient in pairs if gradient is not None}
    if len(frozen) == len(parameters):
        raise ValueError(
            f"all levels of {type(encoder).__name__} depend on all of its weights, so there are no "
            "stages to train alone: trainable must be all or none"
        )
    return frozen


def keep_frozen_in_eval_(module: nn.Module) -> None:
    """Put every part whose parameters are all frozen into eval mode: norms, dropout, drop path.

    >>> frozen = nn.Sequential(nn.BatchNorm2d(2).requires_grad_(False), nn.BatchNorm2d(2))
    >>> keep_frozen_in_eval_(frozen.train()); [norm.training for norm in frozen]
    [False, True]
    """
    parameters = [*module.parameters()]
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        keep_frozen_in_eval_(child)
