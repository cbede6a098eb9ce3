"""Resize the images of a source for evaluation; masks stay as they are."""

from seglab.data.sources.source import Pixels, Shapes, Source, SourceWrapper
from seglab.data.transforms.resizing import fit_size, resize_image


class Resized(SourceWrapper):
    """Images resized to fit into a box, keeping their ratio; masks at their own size.

    Args:
        source: Where the images come from.
        box: (long, short) sides in pixels.
    """

    def __init__(self, source: Source, box: tuple[int, int]) -> None:
        super().__init__(source)
        self.box = box

    def shapes(self, index: int) -> Shapes:
        """Compute the resized shape."""
        image, mask = self.source.shapes(index)
        return Shapes(fit_size(image, self.box), mask)

    def read(self, index: int, epoch: int = 0) -> tuple[Pixels, Pixels]:
        """Read and resize."""
        image, mask = self.source.read(index, epoch)
        return resize_image(image, fit_size(image.shape[:2], self.box)), mask
