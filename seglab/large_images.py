"""Label images that are too large for memory: windows stream through a bounded sum.

The image is cut into panels, as wide as a memory budget allows the sums of logits to be. Each panel
is walked from top to bottom by the same grid of windows as `seglab.inference.slide`; the rows above
the next window are finished, become ids and leave memory. Windows that reach over two panels are
run for both. Every pixel sums the same windows in the same order as `slide`: panels leave no seam.

Ids go to a file that is mapped into memory, then tile by tile into a compressed TIFF with colours
and the georeference of the source, which appears under its name when it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seglab.inference import Forward, Inference, usual_stride, window_weight, windows

TILE = 256  # side of the written tiles, pixels
_GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737)  # GeoTIFF's tags, OGC 19-008r4


class Readable(Protocol):
    """An image of which rectangles can be read, (h, w, C) in 0..255."""

    shape: tuple[int, int]

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Return the pixels of a rectangle."""
        ...


@dataclass
class WindowStream:
    """Labels an image window by window.

    Attributes:
        network: Windows (B, C, h, w) to logits (B, K, h, w).
        num_classes: K.
        inference: Windows and blending; one view.
        device: Of the network.
        memory: Bytes that the sums of logits may take; what the network needs for its windows
            comes on top.
        batch_size: Windows that the network sees at once.
        progress: Called with the finished and all windows.
    """

    network: Forward
    num_classes: int
    inference: Inference
    device: torch.device
    memory: int = 1 << 30
    batch_size: int = 1
    progress: Callable[[int, int], None] | None = None
    _n_done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.inference.crop_size is None or self.inference.n_views > 1:
            raise ValueError(
                "large images are labelled by windows of one view, but the evaluation rule is"
                f" crop_size={self.inference.crop_size}, scales={self.inference.scales},"
                f" flip={self.inference.flip}: give a window, such as (1024, 1024), to be used"
                " instead"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: it must be at least 1")
        self.crop: tuple[int, int] = self.inference.crop_size
        self.stride = self.inference.stride or usual_stride(self.crop)

    def __call__(self, image: Readable, out: NDArray[Any]) -> None:
        """Write the class ids of every pixel to `out`, (H, W)."""
        self._n_done = 0
        height, width = image.shape
        rows = list(windows(height, self.crop[0], self.stride[0]))
        columns = list(windows(width, self.crop[1], self.stride[1]))
        panels = list(self.panels(height, width))
        total = len(rows) * sum(len(_touching(columns, panel)) for panel in panels)
        for panel in panels:
            for done, ids in self._panel(image, rows, _touching(columns, panel), panel, total):
                out[done, panel] = ids

    def panels(self, height: int, width: int) -> Iterator[slice]:
        """Cut the width so that the sums of one panel stay within the budget.

        Raises:
            ValueError: Not even a panel as wide as a window does.
        """
        # float32 sums of K classes and of the weights, and int64 ids of finished rows
        column_bytes = 4 * (self.num_classes + 3) * min(self.crop[0], height)
        at_most = self.memory // column_bytes
        if at_most < min(self.crop[1], width):
            least = column_bytes * min(self.crop[1], width)
            raise ValueError(
                f"memory={self.memory} bytes hold no window of {self.crop} pixels and"
                f" {self.num_classes} classes: allow at least {least}, or make the window smaller"
            )
        n_panels = -(-width // at_most)
        side = -(-width // n_panels)
        for left in range(0, width, side):
            yield slice(left, min(left + side, width))

    @torch.inference_mode()
    def _panel(
        self, image: Readable, rows: list[slice], columns: list[slice], panel: slice, total: int
    ) -> Iterator[tuple[slice, NDArray[Any]]]:
        """Finished rows of a panel, and their ids."""
        height = rows[0].stop - rows[0].start
        sums = torch.zeros(
            self.num_classes + 1, height, panel.stop - panel.start, device=self.device
        )
        for index, row in enumerate(rows):
            self._add_row(sums, image, row, columns, panel)
            self._n_done += len(columns)
            if self.progress:
                self.progress(self._n_done, total)
            end = rows[index + 1].start if index + 1 < len(rows) else row.stop
            n_finished = end - row.start
            yield slice(row.start, end), self._ids(sums[:, :n_finished])
            # Plane by plane: `roll` would make a second copy of all sums.
            n_left = height - n_finished
            for plane in sums:
                plane[:n_left] = plane[n_finished:].clone()
            sums[:, n_left:] = 0

    def _add_row(
        self, sums: Tensor, image: Readable, row: slice, columns: list[slice], panel: slice
    ) -> None:
        """Add the windows of a row; the last plane of `sums` takes their weights."""
        left = columns[0].start
        pixels = image.read(row, slice(left, columns[-1].stop))
        planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        for start in range(0, len(columns), self.batch_size):
            group = columns[start : start + self.batch_size]
            cut = [planes[..., column.start - left : column.stop - left] for column in group]
            logits = self.network(torch.stack(cut).to(self.device)).float()
            weight = window_weight(logits.shape[-2:], self.inference.blend).to(self.device)
            for column, scores in zip(group, logits, strict=True):
                _add(sums, scores, weight, column, panel)

    def _ids(self, sums: Tensor) -> NDArray[Any]:
        scores = sums[:-1].div_(sums[-1])  # in place: these rows are not needed again
        ids = scores.argmax(0)
        ids = ids.to(torch.uint8) if self.num_classes <= 256 else ids
        found: NDArray[Any] = ids.cpu().numpy()
        return found


def _touching(columns: list[slice], panel: slice) -> list[slice]:
    return [c for c in columns if c.start < panel.stop and c.stop > panel.start]


def _add(sums: Tensor, logits: Tensor, weight: Tensor, column: slice, panel: slice) -> None:
    """Add the part of a window that lies in a panel."""
    start, stop = max(column.start, panel.start), min(column.stop, panel.stop)
    inside = slice(start - column.start, stop - column.start)
    place = sums[..., start - panel.start : stop - panel.start]
    place[:-1] += logits[..., inside] * weight[:, inside]
    place[-1] += weight[:, inside]


def label_to_tiff(
    stream: WindowStream, image: Readable, output: Path, colors: NDArray[np.uint8], source: Path
) -> None:
    """Label an image into a tiled TIFF of class ids.

    Args:
        stream: What labels.
        image: What is labelled.
        output: Of the file; it appears when it is complete. Missing folders are made.
        colors: uint8 (256, 3), see `seglab.visualize.color_table`.
        source: The image's file, whose georeference is copied.
    """
    import tifffile

    height, width = image.shape
    dtype = np.uint8 if stream.num_classes <= 256 else np.int64
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        ids: Any = np.lib.format.open_memmap(
            Path(folder, "ids.npy"), "w+", dtype=dtype, shape=(height, width)
        )
        stream(image, ids)
        colored = {"photometric": "palette", "colormap": (colors.T.astype(np.uint16) * 257)}
        tifffile.imwrite(
            Path(folder, "ids.tif"),
            _tiles(ids),
            shape=(height, width),
            dtype=dtype,
            tile=(TILE, TILE),
            compression="zlib",
            bigtiff=height * width > 2**31,
            extratags=_georeference(source),
            metadata=None,
            **(colored if dtype == np.uint8 else {"photometric": "minisblack"}),
        )
        del ids
        os.replace(Path(folder, "ids.tif"), output)


def _tiles(ids: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for top in range(0, ids.shape[0], TILE):
        for left in range(0, ids.shape[1], TILE):
            part = ids[top : top + TILE, left : left + TILE]
            missing = [(0, TILE - side) for side in part.shape]
            yield np.pad(part, missing)


def _georeference(source: Path) -> list[tuple[int, int, int, Any, bool]]:
    """GeoTIFF's tags of a file, if it is one and has any."""
    if source.suffix.lower() not in (".tif", ".tiff"):
        return []
    import tifffile

    with tifffile.TiffFile(source) as file:
        tags = file.pages[0].tags
        found = [tags[code] for code in _GEOREFERENCE if code in tags]
        return [(tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in found]
