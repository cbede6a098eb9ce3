"""Networks: encoders, decode heads and what joins them.

Everything is imported on first use, so that `train.py --help` does not pay for timm or smp.
"""

from typing import TYPE_CHECKING

from seglab.lazy_names import lazy_names

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Encoder": "seglab.models.encoders",
        "FusionBlock": "seglab.operators.fusion_conv",
        "FusionConv2d": "seglab.operators.fusion_conv",
        "Network": "seglab.models.segmenter",
        "Segmenter": "seglab.models.segmenter",
        "SmpNetwork": "seglab.models.smp",
        "TimmEncoder": "seglab.models.encoders",
    },
)
