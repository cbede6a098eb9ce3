"""Masks as the ADE20K and Cityscapes servers take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seglab.data.cityscapes import TRAINED_IDS
from seglab.data.classes import ADE20K_NAMES, CITYSCAPES_NAMES
from seglab.data.sources.source import Pixels

_NAMES = {"ade20k": ADE20K_NAMES, "cityscapes": CITYSCAPES_NAMES}
_VALUES = {
    "ade20k": np.arange(1, 151, dtype=np.uint8),  # 0 is "other", as in the annotations
    "cityscapes": np.array(TRAINED_IDS, np.uint8),  # label ids, not train ids
}


def refuse_other_classes(submission: str, class_names: Sequence[str]) -> None:
    """Raise ValueError unless a network has the benchmark's classes in the benchmark's order."""
    expected = _NAMES[submission]
    if tuple(class_names) != tuple(expected):
        raise ValueError(
            f"submission {submission} needs its {len(expected)} classes ({expected[0]},"
            f" {expected[1]}, ...), but the checkpoint has {len(class_names)}"
            f" ({', '.join(class_names[:2])}, ...): use a checkpoint trained on {submission}"
        )


def save_submission(path: Path, ids: Pixels, submission: str) -> None:
    """Write class ids (H, W) as the server's values, an 8-bit grey PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(_VALUES[submission][ids]).save(path, format="PNG")
