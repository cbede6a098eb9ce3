"""Data: five data modules with one batch contract.

Every batch is ``{"image": uint8 (B, 3, H, W) RGB, "mask": uint8 (B, H, W), "name": list[str]}``
with 255 meaning "ignore". The names below are loaded when first used, so that importing the
package costs nothing (torch, Lightning and OpenCV take seconds).
"""

import os
from typing import TYPE_CHECKING

from seglab.lazy_names import lazy_names

if TYPE_CHECKING:
    from seglab.data.ade20k import ADE20KDataModule as ADE20KDataModule
    from seglab.data.base import SegmentationDataModule as SegmentationDataModule
    from seglab.data.cityscapes import CityscapesDataModule as CityscapesDataModule
    from seglab.data.dataset import SegmentationDataset as SegmentationDataset
    from seglab.data.errors import DataError as DataError
    from seglab.data.folder import FolderDataModule as FolderDataModule
    from seglab.data.scenes import ScenesDataModule as ScenesDataModule
    from seglab.data.voc import VOCAugDataModule as VOCAugDataModule

# albumentations asks its server for news whenever it is imported, unless told not to
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


__all__ = [
    "ADE20KDataModule",
    "CityscapesDataModule",
    "DataError",
    "FolderDataModule",
    "ScenesDataModule",
    "SegmentationDataModule",
    "SegmentationDataset",
    "VOCAugDataModule",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ADE20KDataModule": ".ade20k",
        "CityscapesDataModule": ".cityscapes",
        "DataError": ".errors",
        "FolderDataModule": ".folder",
        "ScenesDataModule": ".scenes",
        "SegmentationDataModule": ".base",
        "SegmentationDataset": ".dataset",
        "VOCAugDataModule": ".voc",
    },
)
