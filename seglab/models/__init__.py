"""Networks: encoders, decode heads and what joins them.

Everything is imported on first use, so that `train.py --help` does not pay for timm or smp.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seglab.models.encoders import Encoder, TimmEncoder
    from seglab.models.segmenter import Network, Segmenter
    from seglab.models.smp import SmpNetwork
    from seglab.operators.fusion_conv import FusionBlock, FusionConv2d

__all__ = [
    "Encoder",
    "FusionBlock",
    "FusionConv2d",
    "Network",
    "Segmenter",
    "SmpNetwork",
    "TimmEncoder",
]

_HOME = {
    "Encoder": "seglab.models.encoders",
    "FusionBlock": "seglab.operators.fusion_conv",
    "FusionConv2d": "seglab.operators.fusion_conv",
    "Network": "seglab.models.segmenter",
    "Segmenter": "seglab.models.segmenter",
    "SmpNetwork": "seglab.models.smp",
    "TimmEncoder": "seglab.models.encoders",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
