"""The training transforms of MMSegmentation's recipes, in its order."""

from albumentations import BasicTransform, HorizontalFlip

from seglab.data.sources.source import Shape
from seglab.data.transforms.geometry import MEAN_COLOR, MEAN_GREY, Pad, RandomResizeCrop
from seglab.data.transforms.photometric import BandDistortion, PhotoMetricDistortion


def standard_transforms(
    crop_size: Shape,
    scale: tuple[int, int] | None = None,
    ratio: tuple[float, float] = (0.5, 2.0),
    cat_max_ratio: float = 0.75,
    fill: tuple[int, int, int] = MEAN_COLOR,
    is_rgb: bool = True,
) -> list[BasicTransform]:
    """Return the training transforms of MMSegmentation's recipes.

    Args:
        crop_size: Height and width of what the network sees.
        scale: See `RandomResize`; (2048, 512) for ADE20K and VOC, (2048, 1024) for Cityscapes.
        ratio: See `RandomResize`.
        cat_max_ratio: See `RandomCrop`.
        fill: See `Pad`.
        is_rgb: Images are 8-bit RGB. Others get `BandDistortion` instead of a distortion of
            colours, and are padded with grey.

    >>> [type(t).__name__ for t in standard_transforms((64, 64))]
    ['RandomResizeCrop', 'HorizontalFlip', 'PhotoMetricDistortion', 'Pad']
    """
    height, width = crop_size
    distortion = PhotoMetricDistortion() if is_rgb else BandDistortion()
    return [
        RandomResizeCrop(height, width, scale, ratio, cat_max_ratio),
        HorizontalFlip(p=0.5),
        distortion,
        Pad(height, width, fill if is_rgb else MEAN_GREY),
    ]
