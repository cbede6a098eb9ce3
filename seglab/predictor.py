"""Use a trained network in three lines of Python: no trainer, no data module.

model = seglab.load("best.ckpt")
ids = model.predict("street.jpg")
picture = model.overlay("street.jpg")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seglab.checkpoints import read_checkpoint, refuse_mismatch
from seglab.data.sources.reading import ImageFormat, read_image
from seglab.data.transforms.resizing import fit_size, resize_image
from seglab.task import SegmentationTask
from seglab.visualize import Pixels, as_rgb, color_table, overlay

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike: TypeAlias = str | Path | NDArray[Any] | Tensor | Image

_IMAGE_SUFFIX_HINT = "a path, a PIL image, an array (H, W, C) or a tensor (C, H, W)"


def load(checkpoint: str | Path, device: str | torch.device | None = None) -> Predictor:
    """Load a trained network to be used.

    Args:
        checkpoint: A checkpoint of `fit`.
        device: Where to run; a GPU if there is one when left out.

    Returns:
        A model with `predict`, `overlay` and `class_names`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint of this program, or its weights do not fit its config.
    """
    content = read_checkpoint(checkpoint)
    config = content.get("config")
    if config is None or "state_dict" not in content:
        raise ValueError(
            f"{checkpoint} holds no config: seglab.load takes checkpoints written by `fit`; for "
            "bare weights build the network yourself and use load_state_dict"
        )
    task = _build_task(config["model"], content["hyper_parameters"])
    refuse_mismatch(task.state_dict(), content["state_dict"], f"checkpoint {checkpoint}")
    task.load_state_dict(content["state_dict"])
    options = config["data"].get("init_args", {})
    low_high = options.get("value_range")
    image_format = ImageFormat(
        options.get("channels", 3),
        tuple(low_high) if low_high else None,
        options.get("drop_alpha", False),
    )
    best = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Predictor(task.to(best).eval(), image_format, options.get("eval_scale"))


def _build_task(section: dict[str, Any], linked: dict[str, Any]) -> SegmentationTask:
    """Build a config's model without fetching the weights that its encoder began from.

    Args:
        section: `model` of the config.
        linked: What the data told the model: classes, names, colours.
    """
    import yaml
    from jsonargparse import ArgumentParser

    known = ("num_classes", "class_names", "palette", "ignore_index")
    section = {**section, "weights": None, **{key: linked[key] for key in known if key in linked}}
    section["network"]["init_args"]["num_classes"] = linked["num_classes"]
    encoder = section.get("network", {}).get("init_args", {}).get("encoder", {})
    for key, off in (("pretrained", False), ("checkpoint_path", None)):
        if key in encoder.get("init_args", {}):
            encoder["init_args"][key] = off
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SegmentationTask, "model")
    config = parser.parse_args([f"--model={yaml.safe_dump(section, default_flow_style=True)}"])
    task: SegmentationTask = parser.instantiate(config).model
    return task


class Predictor:
    """A trained network with the evaluation rule of its checkpoint.

    Args:
        task: The trained task.
        image_format: What image files and arrays hold.
        eval_scale: (long, short) box in pixels that images are resized to fit in; None: not.
    """

    def __init__(
        self,
        task: SegmentationTask,
        image_format: ImageFormat | None = None,
        eval_scale: Sequence[int] | None = None,
    ) -> None:
        self.task = task
        self.image_format = image_format or ImageFormat()
        self.eval_scale = (eval_scale[0], eval_scale[1]) if eval_scale else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by id."""
        return self.task.class_names

    @property
    def palette(self) -> Pixels:
        """One RGB colour per class, uint8 (K, 3)."""
        return color_table(self.task.palette, self.task.num_classes)[: self.task.num_classes]

    def predict(self, image: ImageLike | Sequence[ImageLike], probabilities: bool = False) -> Any:
        """Label every pixel at the image's own size.

        Args:
            image: A path, a PIL image, an array (H, W, C) or (H, W), or a tensor (C, H, W), as in
                training: 8-bit, or raw values where the checkpoint has a value range. Or a list of
                them, of any sizes.
            probabilities: Return the softmax instead of ids.

        Returns:
            uint8 (H, W) class ids (int64 above 256 classes); with `probabilities` float32
            (K, H, W). A list of them for a list.

        Raises:
            ValueError: If it is none of these, or has other bands than the network takes.
        """
        if isinstance(image, (list, tuple)):
            return list(self.predict_many(image, probabilities))
        return self._label(self.read(image), probabilities)

    def predict_many(
        self, images: Iterable[ImageLike], probabilities: bool = False
    ) -> Iterator[NDArray[Any]]:
        """Label images one after another as they come: folders, frames of a video.

        Args:
            images: As in `predict`; may be a generator.
            probabilities: As in `predict`.

        Yields:
            What `predict` returns, one per image.
        """
        for image in images:
            yield self._label(self.read(image), probabilities)

    def overlay(self, image: ImageLike, opacity: float = 0.5) -> Pixels:
        """Lay the predicted classes over the image.

        Args:
            image: As in `predict`.
            opacity: Of the colours, 0..1.

        Returns:
            uint8 RGB (H, W, 3).
        """
        pixels = self.read(image)
        ids = self._label(pixels, probabilities=False)
        colors = color_table(self.task.palette, self.task.num_classes)
        return overlay(as_rgb(pixels), ids.astype(np.uint8), colors, opacity)

    def read(self, image: Any) -> Pixels:
        """Turn an image into what the network takes, (H, W, C) in 0..255."""
        if isinstance(image, (str, Path)):
            return read_image(Path(image), self.image_format)
        if isinstance(image, Tensor):
            array = image.detach().cpu().numpy()
            array = array.transpose(1, 2, 0) if array.ndim == 3 else array
        elif isinstance(image, np.ndarray):
            array = image
            channels = self.image_format.channels
            if array.ndim == 3 and array.shape[0] == channels != array.shape[2]:
                raise ValueError(
                    f"predict got an array of shape {array.shape}, but arrays have their "
                    f"{channels} channels last: give array.transpose(1, 2, 0)"
                )
        elif hasattr(image, "convert"):
            array = _from_pil(image)
        else:
            raise ValueError(f"predict takes {_IMAGE_SUFFIX_HINT}, not {type(image).__name__}")
        if array.ndim not in (2, 3) or 0 in array.shape:
            raise ValueError(f"predict takes {_IMAGE_SUFFIX_HINT}, got shape {array.shape}")
        return self.image_format.convert(array, Path("given to predict"))

    @torch.inference_mode()
    def _label(self, pixels: Pixels, probabilities: bool) -> NDArray[Any]:
        size = pixels.shape[0], pixels.shape[1]
        if self.eval_scale:
            pixels = resize_image(pixels, fit_size(size, self.eval_scale))
        planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        image = torch.from_numpy(planes)[None].to(self.task.device)
        task = self.task
        if probabilities:
            scores = task.inference(task.network, image, size).float()
            chances = scores if task.inference.n_views > 1 else scores.softmax(1)
            found: NDArray[Any] = chances[0].cpu().numpy()
            return found
        mask = torch.zeros(1, *size, dtype=torch.uint8, device=task.device)
        ids: NDArray[Any] = task.predict_step({"image": image, "mask": mask}, 0)[0].cpu().numpy()
        return ids


def _from_pil(image: Any) -> NDArray[Any]:
    """Turn a PIL image as its EXIF orientation says; palettes become colours."""
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(image)
    if turned.mode in ("P", "1", "CMYK", "YCbCr", "LAB", "HSV"):
        turned = turned.convert("RGB")
    if turned.mode in ("LA", "PA"):
        turned = turned.convert("RGBA")
    return np.asarray(turned)
