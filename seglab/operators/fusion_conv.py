"""The one place where branches of different size become one map: resize, concatenate, convolve.

Every head goes through `FusionConv2d`, an `nn.Conv2d` that takes the *list* of branches. Its weight
and its state-dict key are those of the ordinary convolution over the concatenation, so checkpoints
load by name. Where it is faster, it never makes the resized branches (`operators/fused_conv.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seglab.operators.branches import convolve_branches
from seglab.operators.fused_conv import Geometry
from seglab.operators.observers import requires_plain_operators
from seglab.operators.resampling import ConvAxis, Resampling
from seglab.torch_internals import padding_of_axes

Force = Literal["plain", "fused"]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, h, w) bilinearly to `size`, half-pixel centres; equal sizes pass untouched.

    >>> resize(torch.zeros(1, 3, 4, 4), (8, 6)).shape
    torch.Size([1, 3, 8, 6])
    """
    return Resampling()(x, size)


class FusionConv2d(nn.Conv2d):
    """A convolution over the channel concatenation of several branches, each at its own size.

    The input channels of the weight are the branches' channels in the order of the list. The result
    is that of resizing, concatenating and convolving. A branch that must be resized is instead
    multiplied at its own resolution where a model of measured costs says that this is faster;
    nothing full-size is then made for it or kept for the backward pass.

    While something watches or records operations (a torch-function mode, tracing, export,
    transforms of `torch.func`) they are the ordinary ones: interpolate, cat, conv2d. So they are
    for grouped convolutions, padding other than zeros, and dtypes and devices without measured
    costs.

    Args:
        *args: as for `nn.Conv2d`.
        mode: how branches are resized, "bilinear" or "nearest".
        align_corners: for "bilinear", as in `torch.nn.functional.interpolate`.
        force: "plain" or "fused" to overrule the costs. May be changed later.
        **kwargs: as for `nn.Conv2d`.

    Raises:
        ValueError: a mode or a `force` of another name.

    >>> conv = FusionConv2d(8 + 4, 16, 3, padding=1)
    >>> fine, coarse = torch.zeros(2, 8, 32, 32), torch.zeros(2, 4, 16, 16)
    >>> conv([fine, coarse]).shape
    torch.Size([2, 16, 32, 32])
    """

    def __init__(
        self,
        *args: Any,
        mode: str = "bilinear",
        align_corners: bool = False,
        force: Force | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.resampling = Resampling(mode, align_corners)
        self.force = force

    def forward(  # type: ignore[override]  # the point of the class: a list instead of one map
        self,
        features: Sequence[Tensor],
        size: tuple[int, int] | None = None,
        force: Force | None = None,
    ) -> Tensor:
        """Bring each branch to `size` (default: the first branch's), concatenate, convolve.

        Args:
            features: branches, each (B, C_i, h_i, w_i) with sum of C_i = `in_channels`.
            size: height and width of the resized branches.
            force: overrules the attribute `force` for this call.

        Raises:
            ValueError: the branches' channels do not add up to `in_channels`, or fusing was forced
                on a convolution that cannot.
        """
        self._check(features)
        height, width = size or features[0].shape[-2:]
        chosen = _checked(force) or _checked(self.force)
        obstacle = self._obstacle()
        if chosen == "fused" and obstacle:
            raise ValueError(f"force='fused' is impossible for {obstacle}: leave force at None")
        if obstacle or chosen == "plain" or requires_plain_operators(*features, self.weight):
            return self._convolve_resized(features, (height, width))
        geometry = self._geometry(int(height), int(width))
        result = convolve_branches(features, self.weight, self.bias, geometry, chosen)
        return result[0] if result else self._convolve_resized(features, (height, width))

    def _check(self, features: Sequence[Tensor]) -> None:
        if sum(feature.shape[1] for feature in features) != self.in_channels:
            raise ValueError(
                f"fusion expects {self.in_channels} channels, got branches of "
                f"{[feature.shape[1] for feature in features]}: give one for each it was built for"
            )

    def _obstacle(self) -> str | None:
        """What about the convolution keeps it from being fused."""
        if self.groups != 1:
            return f"a convolution in {self.groups} groups"
        if self.padding_mode != "zeros":
            return f"padding_mode={self.padding_mode!r}"
        if self.padding == "same" and not all(side % 2 for side in self.kernel_size):
            return f"padding='same' with a kernel of {self.kernel_size}"
        return None

    def _geometry(self, height: int, width: int) -> Geometry:
        rows, columns = (
            ConvAxis(*axis)
            for axis in zip(
                self.kernel_size, self.stride, padding_of_axes(self), self.dilation, strict=True
            )
        )
        return Geometry((height, width), rows, columns, self.resampling)

    def _convolve_resized(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        resized = [self.resampling(feature, size) for feature in features]
        return super().forward(torch.cat(resized, dim=1))


def _checked(force: str | None) -> str | None:
    if force not in (None, "plain", "fused"):
        raise ValueError(f"force is 'plain', 'fused' or None, got {force!r}")
    return force


class FusionBlock(nn.Module):
    """`FusionConv2d`, batch normalization, ReLU: MMSegmentation's ConvModule over a concatenation.

    Sub-modules are `conv` and `bn` as there. Initialization: Kaiming normal with mode fan_out, so
    that it does not depend on how many channels are concatenated (mmengine,
    `model/weight_init.py`).

    >>> block = FusionBlock([8, 4], 16, kernel_size=3)
    >>> block([torch.zeros(2, 8, 32, 32), torch.zeros(2, 4, 16, 16)]).shape
    torch.Size([2, 16, 32, 32])
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        kernel_size: int = 3,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = FusionConv2d(
            sum(in_channels),
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.activate = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Sequence[Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """Fuse branches (B, C_i, h_i, w_i) into (B, out_channels, *size)."""
        fused: Tensor = self.activate(self.bn(self.conv(features, size)))
        return fused
