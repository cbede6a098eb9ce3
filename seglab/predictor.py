"""Use a trained network in three lines of Python: no trainer, no data module.

model = seglab.load("best.ckpt")
ids = model.predict("street.jpg")
picture = model.overlay("street.jpg")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seglab.data.errors import FormatError
from seglab.data.sources.given import to_array
from seglab.data.sources.listing import find_images_below, require_folder
from seglab.data.sources.reading import TIFF_SUFFIXES, ImageFormat, read_image
from seglab.data.sources.regions import Regions
from seglab.data.transforms.resizing import fit_size, resize_image
from seglab.inference import Blend, Inference
from seglab.large_images import WindowStream, label_to_tiff
from seglab.models.segmenter import Network
from seglab.optimizing import Optimizations
from seglab.optimizing import optimize as optimize_network
from seglab.runtimes import Precision
from seglab.task import SegmentationTask
from seglab.visualize import Pixels, as_mask, as_rgb, class_colors, color_table, overlay

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageLike: TypeAlias = str | Path | NDArray[Any] | Tensor | Image


class Predictor:
    """A trained network with the evaluation rule of its checkpoint.

    Args:
        task: The trained task.
        image_format: What image files and arrays hold.
        eval_scale: (long, short) box in pixels that images are resized to fit in; None: not.
        optimize: Make the network faster when the first image is there.
        precision: Of torch's arithmetic, see `load`.

    Attributes:
        optimizations: What was done to the network; None if nothing was so far.
    """

    def __init__(
        self,
        task: SegmentationTask,
        image_format: ImageFormat | None = None,
        eval_scale: Sequence[int] | None = None,
        optimize: bool = False,
        precision: Precision = "32-true",
    ) -> None:
        self.task = task
        self.precision = precision
        self.optimizations: Optimizations | None = None
        self._is_to_optimize = optimize
        self.image_format = image_format or ImageFormat()
        self.eval_scale = (eval_scale[0], eval_scale[1]) if eval_scale else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by id."""
        return self.task.class_names

    @property
    def palette(self) -> Pixels:
        """One RGB colour per class, uint8 (K, 3)."""
        return class_colors(self.task.palette, self.task.num_classes)

    def predict(
        self,
        image: ImageLike | Sequence[ImageLike],
        probabilities: bool = False,
        batch_size: int = 8,
    ) -> Any:
        """Label every pixel at the image's own size.

        Args:
            image: A path, a PIL image, an array (H, W, C) or (H, W), or a tensor (C, H, W), as in
                training: 8-bit, or raw values where the checkpoint has a value range. Or a list of
                them, of any sizes.
            probabilities: Return the softmax instead of ids.
            batch_size: Images of a list that the network sees at once, where their sizes are equal.

        Returns:
            uint8 (H, W) class ids (int64 above 256 classes); with `probabilities` float32
            (K, H, W). A list of them for a list.

        Raises:
            ValueError: If it is none of these, or has other bands than the network takes.
        """
        if isinstance(image, (list, tuple)):
            return list(self.predict_many(image, probabilities, batch_size))
        return self._label([self.read(image)], probabilities)[0]

    def predict_many(
        self,
        images: str | Path | Iterable[ImageLike],
        probabilities: bool = False,
        batch_size: int = 1,
    ) -> Iterator[NDArray[Any]]:
        """Label images one after another as they come: folders, frames of a video.

        Args:
            images: As in `predict`; may be a generator, or a folder, whose images are then taken by
                their sorted names, subfolders included.
            probabilities: As in `predict`.
            batch_size: How many are read before the first is returned; those of one size go through
                the network together.

        Yields:
            What `predict` returns, one per image, in their order.

        Raises:
            ValueError: See `predict`; or `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: it must be at least 1")
        if isinstance(images, (str, Path)):
            cure = "give predict_many a folder, and predict a single image"
            images = find_images_below(require_folder(Path(images), cure)).values()
        return self._stream(iter(images), probabilities, batch_size)

    def overlay(self, image: ImageLike, opacity: float = 0.5) -> Pixels:
        """Lay the predicted classes over the image.

        Args:
            image: As in `predict`.
            opacity: Of the colours, 0..1.

        Returns:
            uint8 RGB (H, W, 3).
        """
        pixels = self.read(image)
        ids = self._label([pixels], probabilities=False)[0]
        return overlay(as_rgb(pixels), as_mask(ids), self.color_table, opacity)

    def predict_large(
        self,
        source: str | Path,
        output: str | Path,
        window: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        **options: Any,
    ) -> Path:
        """Label an image that is too large for memory, into a tiled TIFF of class ids.

        TIFF and NPY files are read part by part; other formats are decoded whole.

        Args:
            source: The image's file.
            output: The file to write, `.tif`; a georeference is copied to it.
            window: Window (height, width) in pixels, at the image's own scale; None: as the
                checkpoint evaluates, which must be by windows then.
            stride: Window step (height, width) in pixels; two thirds of the window if None.
            options: `memory`, `batch_size` and `progress` of
                `seglab.large_images.WindowStream`, and `blend` of `seglab.inference.Inference`.

        Returns:
            Path of the file.

        Raises:
            ValueError: The file is unreadable, or the checkpoint's rule needs the whole image.
        """
        if Path(output).suffix.lower() not in TIFF_SUFFIXES:
            raise ValueError(f"output {output}: large masks are tiled TIFF, name it .tif")
        stream = self._window_stream(window, stride, **options)
        with self._said_of_the_network(), self._autocast():
            image = Regions(Path(source), self.image_format)
            label_to_tiff(stream, image, Path(output), self.color_table, Path(source))
        return Path(output)

    def _window_stream(
        self,
        window: tuple[int, int] | None,
        stride: tuple[int, int] | None,
        blend: Blend | None = None,
        **options: Any,
    ) -> WindowStream:
        rule = self.task.inference
        if window is None and self.eval_scale is not None:
            raise ValueError(
                f"this checkpoint evaluates images resized to fit {self.eval_scale}: use predict,"
                " or give a window to label the image at its own scale"
            )
        if window is None and stride is not None:
            raise ValueError(f"stride={stride} needs a window to step with")
        if window is not None:
            rule = Inference(window, stride)
        rule = replace(rule, blend=blend) if blend else rule
        task = self.task
        if self._is_to_optimize and rule.crop_size is not None:
            shape = (1, self.image_format.channels, *rule.crop_size)
            is_deep = self.image_format.value_range is not None
            noise = torch.randint(0, 256, shape, device=task.device)
            self._optimize_for(noise.float() if is_deep else noise.to(torch.uint8))
        return WindowStream(task.network, task.num_classes, rule, task.device, **options)

    @property
    def color_table(self) -> Pixels:
        """Colours of all values that a mask file can hold, uint8 (256, 3)."""
        return color_table(self.task.palette, self.task.num_classes)

    def read(self, image: Any) -> Pixels:
        """Turn an image into what the network takes, (H, W, C) in 0..255."""
        if isinstance(image, (str, Path)):
            with self._said_of_the_network():
                return read_image(Path(image), self.image_format)
        channels = self.image_format.channels
        shape: tuple[int, ...] = tuple(getattr(image, "shape", ()))
        if isinstance(image, np.ndarray) and len(shape) == 3 and shape[0] == channels != shape[2]:
            raise ValueError(
                f"predict got an array of shape {shape}, but arrays have their {channels} channels "
                "last: give array.transpose(1, 2, 0)"
            )
        with self._said_of_the_network():
            return self.image_format.convert(to_array(image), Path("given to predict"))

    @contextmanager
    def _said_of_the_network(self) -> Iterator[None]:
        """Images that it cannot take are refused in words of its own, not of a data module."""
        try:
            yield
        except FormatError as error:
            other = f", or train one with another {error.setting}" if error.setting else ""
            raise FormatError(
                f"{error.fact}; this network takes {self.image_format}: convert the image{other}"
            ) from None

    def planes(self, pixels: Pixels) -> Pixels:
        """Turn what `read` returned into what evaluation shows to the network, (C, h, w)."""
        if self.eval_scale:
            pixels = resize_image(pixels, fit_size(pixels.shape[:2], self.eval_scale))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _stream(
        self, images: Iterator[ImageLike], probabilities: bool, batch_size: int
    ) -> Iterator[NDArray[Any]]:
        while chunk := [self.read(image) for image in islice(images, batch_size)]:
            yield from self.label(chunk, probabilities)

    def label(self, images: Sequence[Pixels], probabilities: bool = False) -> list[NDArray[Any]]:
        """Label images that `read` returned; those of one size go through the network together."""
        groups: dict[Any, list[int]] = {}
        for index, pixels in enumerate(images):
            groups.setdefault((pixels.shape, pixels.dtype), []).append(index)
        found: dict[int, NDArray[Any]] = {}
        for members in groups.values():
            labelled = self._label([images[index] for index in members], probabilities)
            found.update(zip(members, labelled, strict=True))
        return [found[index] for index in range(len(images))]

    @torch.inference_mode()
    def _label(self, images: Sequence[Pixels], probabilities: bool) -> NDArray[Any]:
        """Label images of one shape; (B, H, W), or (B, K, H, W) of probabilities."""
        size = images[0].shape[0], images[0].shape[1]
        planes = np.stack([self.planes(pixels) for pixels in images])
        image = torch.from_numpy(planes).to(self.task.device)
        task = self.task
        window = task.inference.crop_size
        self._optimize_for(image[:1] if window is None else image[:1, :, : window[0], : window[1]])
        if probabilities:
            with self._autocast():
                scores = task.inference(task.network, image, size).float()
            chances = scores if task.inference.n_views > 1 else scores.softmax(1)
            return np.asarray(chances.cpu())
        mask = torch.zeros(len(image), *size, dtype=torch.uint8, device=task.device)
        with self._autocast():
            ids = task.predict_step({"image": image, "mask": mask}, 0)
        return np.asarray(ids.cpu())

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        kind = self.task.device.type
        return torch.autocast(kind, dtype, enabled=self.precision != "32-true")

    def _optimize_for(self, image: Tensor) -> None:
        """Make the network faster once, for images or windows of this size."""
        if self._is_to_optimize:
            faster, self.optimizations = optimize_network(self.task.network, image)
            assert isinstance(faster, Network)
            self.task.network = faster
            self._is_to_optimize = False
