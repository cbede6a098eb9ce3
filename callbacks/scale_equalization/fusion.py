"""What is found in a network: fusions and their branches, and the errors about them. A leaf."""

from __future__ import annotations

from dataclasses import dataclass


class ScaleEqualizationError(RuntimeError):
    """Anything this package refuses to do, with the place and the cure in its message."""


class NoFusionError(ScaleEqualizationError):
    """No concatenation that feeds a linear layer was found; the message lists what was seen."""


class UnsupportedFusionError(ScaleEqualizationError):
    """A fusion was asked for that cannot be equalized; the message says why."""


class AlreadyEqualizedError(ScaleEqualizationError):
    """A weight was equalized or trained before; equalizing it again would change the network."""


@dataclass(frozen=True)
class Branch:
    """One slice of the input channels of a fusion layer, filled by one concatenated feature map.

    Attributes:
        start: First input channel of the consumer that belongs to the branch.
        stop: One past its last input channel.
        upsampling: Ratio of heights after to before resizing; 1.0 if the map was not resized.
        interpolation: "bilinear", "nearest", ... or None if the map was not resized.
        source: Full name of the module that made the feature map; "" for the network's input.
        blank: True for zeros that no feature map fills, as padding the channels leaves them.
        feature_map: Number of the feature map it is a slice of. Slices of one map are measured
            together and get one scale. None: it is all that arrives of its map.
    """

    start: int
    stop: int
    upsampling: float = 1.0
    interpolation: str | None = None
    source: str = ""
    blank: bool = False
    feature_map: int | None = None

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.stop - self.start


@dataclass(frozen=True)
class Fusion:
    """A linear layer that consumes a concatenation of feature maps.

    Attributes:
        name: Full name of the consuming module, e.g. ``decode_head.fpn_bottleneck.conv``.
        weight_shape: Shape of its weight.
        groups: Groups of a convolution; 1 for a linear layer.
        branches: Its branches in the order of the input channels, without gaps.
        transposed: True for a transposed convolution, whose weight is (in, out / groups, ...).
        norm: Full name of the normalization that directly follows, or None.
        upstream: Names of fusions whose output reaches this one, hence must be equalized first.
        parameter: Name of the weight below the module.
        follower: Full name of the normalization, of any kind, behind it; "" if there is none.
        joined: Widths of what was concatenated on the way to it, for each concatenation.
    """

    name: str
    weight_shape: tuple[int, ...]
    groups: int
    branches: tuple[Branch, ...]
    transposed: bool = False
    norm: str | None = None
    upstream: tuple[str, ...] = ()
    parameter: str = "weight"
    follower: str = ""
    joined: tuple[tuple[int, ...], ...] = ()

    @property
    def in_channels(self) -> int:
        """Number of input channels, over all groups."""
        return self.branches[-1].stop


@dataclass(frozen=True)
class Refusal:
    """A fusion that was seen and is left alone.

    Attributes:
        name: Full name of the consuming module, or of the module that adds branches.
        reason: One sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Findings:
    """Everything one watched forward pass has shown.

    Attributes:
        fusions: Those that can be equalized, in the order of the forward pass.
        refusals: Those that cannot, or are excluded, each with its reason.
        seen: Every concatenation met, as text, for messages.
        takers: Modules whose linear layers took anything that was concatenated, whether or not
            they can be equalized; None if nobody looked.
        notes: What could not be looked at, one sentence each.
    """

    fusions: tuple[Fusion, ...]
    refusals: tuple[Refusal, ...] = ()
    seen: tuple[str, ...] = ()
    takers: frozenset[str] | None = None
    notes: tuple[str, ...] = ()
