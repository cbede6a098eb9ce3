"""Scale equalization: every branch of a feature fusion enters it at the same scale.

Importing this package imports torch only; the callbacks import lightning when first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .equalize import equalize_
from .equivalence import equivalent_param_groups
from .finding import DEFAULT_EXCLUDE, find_fusions
from .folding import ScaleEqualizer, fold_
from .fusion import (
    AlreadyEqualizedError,
    Branch,
    Fusion,
    NoFusionError,
    ScaleEqualizationError,
    UnsupportedFusionError,
)
from .measuring import measure_scales
from .reparametrization import bake_, reparametrize_
from .report import Report
from .statistics import Moments

if TYPE_CHECKING:
    from .callback import ScaleEqualizationCallback
    from .monitor import ScaleMonitor

__version__ = "0.2.0"
__all__ = [
    "DEFAULT_EXCLUDE",
    "AlreadyEqualizedError",
    "Branch",
    "Fusion",
    "Moments",
    "NoFusionError",
    "Report",
    "ScaleEqualizationCallback",
    "ScaleEqualizationError",
    "ScaleEqualizer",
    "ScaleMonitor",
    "UnsupportedFusionError",
    "bake_",
    "equalize_",
    "equivalent_param_groups",
    "find_fusions",
    "fold_",
    "measure_scales",
    "reparametrize_",
]


_LAZY = {"ScaleEqualizationCallback": "callback", "ScaleMonitor": "monitor"}


def __getattr__(name: str) -> Any:
    """The callbacks, imported when first asked for: lightning is slow to import."""
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
