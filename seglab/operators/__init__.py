"""Exact operators that never make the full-size map: fusion, loss and argmax of what is resized.

Everything is imported on first use.
"""

from typing import TYPE_CHECKING

from seglab.lazy_names import lazy_names

if TYPE_CHECKING:
    from seglab.operators.acceleration import accelerate
    from seglab.operators.fusion_conv import FusionConv2d
    from seglab.operators.upsampled import upsampled_argmax, upsampled_nll

__all__ = ["FusionConv2d", "accelerate", "upsampled_argmax", "upsampled_nll"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FusionConv2d": ".fusion_conv",
        "accelerate": ".acceleration",
        "upsampled_argmax": ".upsampled",
        "upsampled_nll": ".upsampled",
    },
)
