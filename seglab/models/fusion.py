"""The one place where branches of different size become one map: resize, concatenate, convolve.

Every head goes through `FusionConv2d`, an `nn.Conv2d` that takes the *list* of branches. Its weight
and its state-dict key are those of the ordinary convolution over the concatenation, so checkpoints
load by name. Where it is faster, it never makes the resized branches (`fused_conv.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seglab.models.fused_conv import Geometry
from seglab.models.fusion_costs import choose_fused
from seglab.models.fusion_op import fuse
from seglab.observers import needs_ordinary_operations
from seglab.resampling import Resampling, Window

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
        if obstacle or chosen == "plain" or needs_ordinary_operations(*features, self.weight):
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
        # The order of this attribute is left, right, top, bottom; it spells out "same" and "valid".
        paddings = self._reversed_padding_repeated_twice[2::-2]
        rows, columns = (
            Window(*axis)
            for axis in zip(self.kernel_size, self.stride, paddings, self.dilation, strict=True)
        )
        return Geometry((height, width), rows, columns, self.resampling)

    def _convolve_resized(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        resized = [self.resampling(feature, size) for feature in features]
        return super().forward(torch.cat(resized, dim=1))


def convolve_branches(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    force: str | None = None,
) -> tuple[Tensor, tuple[bool, ...]] | None:
    """Convolve the concatenation of resized branches, at least one of them at its own resolution.

    Args:
        features: branches (B, C_i, h_i, w_i).
        weight: (O, sum of C_i, kh, kw).
        bias: (O,) or None.
        geometry: size, convolution and resampling.
        force: as for `FusionConv2d`.

    Returns:
        The result (B, O, *geometry.out_size) and which branches were fused; None if fusing any
        would be slower, or they are not alike.
    """
    branches, weight, bias = _as_autocast(features, weight, bias)
    if any(x.dtype != weight.dtype or x.ndim != 4 for x in branches):
        return None
    fused = choose_fused(branches, len(weight), geometry, force)
    if not any(fused):
        return None
    runs = _runs(fused)
    # One split, whose gradient is one concatenation.
    channels = [sum(branches[index].shape[1] for index in run) for run in runs]
    slices = torch.split(weight, channels, dim=1)
    pairs = list(zip(runs, slices, strict=True))
    maps = [branches[run[0]] for run in runs if fused[run[0]]]
    parts = [part for run, part in pairs if fused[run[0]]]
    direct = [branches[index] for run in runs for index in run if not fused[index]]
    if direct:
        resized = [geometry.resampling(x, geometry.size) for x in direct]
        maps.insert(0, _concatenate(resized))
        parts.insert(0, _concatenate([part for run, part in pairs if not fused[run[0]]]))
    return fuse(maps, parts, bias, geometry, direct=bool(direct)), fused


def _runs(fused: Sequence[bool]) -> list[list[int]]:
    """Indices of branches that share one slice of the weight: neighbours that are not fused.

    >>> _runs([False, False, True, True, False])
    [[0, 1], [2], [3], [4]]
    """
    runs: list[list[int]] = []
    for index, is_fused in enumerate(fused):
        if runs and not is_fused and not fused[index - 1]:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)


def _checked(force: str | None) -> str | None:
    if force not in (None, "plain", "fused"):
        raise ValueError(f"force is 'plain', 'fused' or None, got {force!r}")
    return force


def _as_autocast(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Cast as `F.conv2d` would under autocast."""
    device = weight.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return list(features), weight, bias
    dtype = torch.get_autocast_dtype(device)
    cast = [x.to(dtype) for x in (*features, weight)]
    return cast[:-1], cast[-1], None if bias is None else bias.to(dtype)


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
