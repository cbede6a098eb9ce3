"""Training transforms: MMSegmentation's, as albumentations transforms; any other fits beside them.

The names below are loaded when first used: albumentations takes seconds to import.
"""

from typing import TYPE_CHECKING

from seglab.lazy_names import lazy_names

if TYPE_CHECKING:
    from seglab.data.transforms.geometry import MEAN_COLOR as MEAN_COLOR
    from seglab.data.transforms.geometry import Pad as Pad
    from seglab.data.transforms.geometry import RandomCrop as RandomCrop
    from seglab.data.transforms.geometry import RandomResize as RandomResize
    from seglab.data.transforms.geometry import RandomResizeCrop as RandomResizeCrop
    from seglab.data.transforms.geometry import has_mixed_classes as has_mixed_classes
    from seglab.data.transforms.photometric import BandDistortion as BandDistortion
    from seglab.data.transforms.photometric import PhotoMetricDistortion as PhotoMetricDistortion
    from seglab.data.transforms.recipe import standard_transforms as standard_transforms


__all__ = [
    "MEAN_COLOR",
    "BandDistortion",
    "Pad",
    "PhotoMetricDistortion",
    "RandomCrop",
    "RandomResize",
    "RandomResizeCrop",
    "has_mixed_classes",
    "standard_transforms",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MEAN_COLOR": ".geometry",
        "Pad": ".geometry",
        "BandDistortion": ".photometric",
        "PhotoMetricDistortion": ".photometric",
        "RandomCrop": ".geometry",
        "RandomResize": ".geometry",
        "RandomResizeCrop": ".geometry",
        "has_mixed_classes": ".geometry",
        "standard_transforms": ".recipe",
    },
)
