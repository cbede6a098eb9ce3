"""Exact operators that never make the full-size map: fusion, loss and argmax of what is resized.

Everything is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seglab.operators.acceleration import accelerate
    from seglab.operators.fusion_conv import FusionConv2d
    from seglab.operators.upsampled import upsampled_argmax, upsampled_nll

__all__ = ["FusionConv2d", "accelerate", "upsampled_argmax", "upsampled_nll"]

_HOME = {
    "FusionConv2d": "fusion_conv",
    "accelerate": "acceleration",
    "upsampled_argmax": "upsampled",
    "upsampled_nll": "upsampled",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
