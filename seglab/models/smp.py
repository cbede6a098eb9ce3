"""Any network of segmentation_models_pytorch under the contract of `Network`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from seglab.models.segmenter import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Network,
    Normalize,
    check_bands,
)
from seglab.models.sizes import pad_to_multiple


class SmpNetwork(Network):
    """A network of segmentation_models_pytorch: same task, same callback, any image size.

    smp's networks want sides that are multiples of their deepest stride; the image is padded below
    and right (with the mean colour) and the logits are cropped back.

    Args:
        arch: smp's architecture: Unet, UnetPlusPlus, FPN, PSPNet, DeepLabV3Plus, UPerNet,
            Segformer...
        encoder: smp's encoder name; `tu-` before it takes it from timm.
        num_classes: K, the number of logits.
        weights: smp's name of pretrained encoder weights, such as `imagenet`; None trains from
            scratch.
        options: further arguments of the architecture, such as `decoder_channels`.
        mean: per band, in 0..255; ImageNet's RGB when left out.
        std: per band, in 0..255.
        multiple: what the padded sides are multiples of.
        in_channels: bands of the image; smp adapts pretrained weights as timm does (see
            `TimmEncoder`).
        trainable: `all`, or `none` for an encoder that stays as it is bit by bit, its norms in eval
            mode.

    Raises:
        ValueError: unknown architecture or encoder, or arguments that do not go together.

    >>> import torch
    >>> network = SmpNetwork("Unet", "resnet18", num_classes=3).eval()
    >>> network(torch.zeros(1, 3, 33, 50, dtype=torch.uint8)).shape
    torch.Size([1, 3, 33, 50])
    """

    def __init__(
        self,
        arch: str,
        encoder: str,
        num_classes: int,
        weights: str | None = None,
        options: dict[str, Any] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        multiple: int = 32,
        in_channels: int = 3,
        trainable: Literal["all", "none"] = "all",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.multiple = multiple
        self.in_channels = in_channels
        self.normalize = Normalize(*check_bands(mean, std, in_channels))
        bands = {} if in_channels == 3 else {"in_channels": in_channels}
        self.model = _create(
            arch, encoder, num_classes, weights, bands | _any_size(encoder) | (options or {})
        )

        if trainable not in ("all", "none"):
            raise ValueError(f"trainable must be all or none for smp's encoders; got {trainable!r}")
        self.trainable = trainable
        if trainable == "none":
            self.model.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> SmpNetwork:
        """As of any module; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.trainable == "none":
            self.model.encoder.eval()
        return self

    def translate_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Take the state dict of smp's own network besides ours."""
        return _own_names(self.state_dict(), state)

    def decode(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return (logits,); smp's networks end with their own upsampling to the image."""
        return (self(image),)

    def forward(self, image: Tensor) -> Tensor:
        """Map a uint8 or float RGB image in 0..255, (B, 3, H, W), to logits (B, K, H, W).

        Raises:
            ValueError: the architecture's output is smaller than its input, which `options` decide.
        """
        height, width = image.shape[-2:]
        padded = pad_to_multiple(self.normalize(image), self.multiple)
        logits: Tensor = self.model(padded)
        if logits.shape[-2:] != padded.shape[-2:]:
            raise ValueError(
                f"smp's {type(self.model).__name__} returned {tuple(logits.shape[-2:])} for an "
                f"image of {tuple(padded.shape[-2:])}: set `upsampling` in `options` to match"
            )
        return logits[..., :height, :width]


def _own_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Put `model.` before the names of a network of smp that was saved on its own."""
    renamed = {f"model.{key}": value for key, value in state.items()}
    is_bare = bool(renamed) and renamed.keys() <= own.keys()
    return renamed if is_bare else state


def _any_size(encoder: str) -> dict[str, Any]:
    """Swin checks the image's size unless told otherwise."""
    return {"strict_img_size": False} if encoder.startswith("tu-swin") else {}


def _create(
    arch: str, encoder: str, num_classes: int, weights: str | None, options: dict[str, Any]
) -> Any:
    import segmentation_models_pytorch as smp

    try:
        return smp.create_model(
            arch, encoder_name=encoder, encoder_weights=weights, classes=num_classes, **options
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"smp cannot build {arch} with {encoder!r} and {options or 'no options'}: {error}"
        ) from error
