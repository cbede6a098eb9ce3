"""How logits come to the size they are compared at."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from seglab.operators.resampling import Resampling

Size = tuple[int, int]


@dataclass(frozen=True)
class LogitResize:
    """How logits come to the size they are compared at.

    Attributes:
        resampling: how they are resized.
        through: height and width of the image, if they are resized to that first and bilinearly
            from there on, as in evaluation at the label's own size.
    """

    resampling: Resampling = field(default_factory=Resampling)
    through: Size | None = None

    def __call__(self, logits: Tensor, size: Size) -> Tensor:
        """Resize (B, K, h, w) to `size`.

        >>> import torch
        >>> LogitResize(through=(6, 6))(torch.zeros(1, 2, 3, 3), (8, 8)).shape
        torch.Size([1, 2, 8, 8])
        """
        for resampling, step in self._steps(size):
            logits = resampling(logits, step)
        return logits

    def columns(self, rows: Tensor, width: int) -> Tensor:
        """Resize the second axis of (n, w, K) to `width`; every row is an image of its own."""
        maps = rows.permute(0, 2, 1).unsqueeze(2)  # (n, K, 1, w), channels last in memory
        for resampling, (_, step) in self._steps((1, width)):
            maps = resampling(maps, (1, step))
        return maps.squeeze(2).permute(0, 2, 1)

    def columns_transposed(self, grad: Tensor, width: int) -> Tensor:
        """Gradient with regard to the argument (n, width, K) of `columns`."""
        maps = grad.permute(0, 2, 1).unsqueeze(2)
        steps = self._steps((1, grad.shape[1]))
        widths = [width, *(step[1] for _, step in steps)]
        for (resampling, _), before in zip(reversed(steps), reversed(widths[:-1]), strict=True):
            maps = resampling.transpose(maps, (1, before))
        return maps.squeeze(2).permute(0, 2, 1)

    def _steps(self, size: Size) -> list[tuple[Resampling, Size]]:
        if self.through is None:
            return [(self.resampling, size)]
        return [(self.resampling, self.through), (Resampling(), size)]


BILINEAR = LogitResize()
