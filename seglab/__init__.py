"""seglab: semantic-segmentation training whose numbers one can trust."""

from typing import TYPE_CHECKING

from seglab.lazy_names import lazy_names

if TYPE_CHECKING:
    from seglab.loading import load
    from seglab.operators.acceleration import accelerate

__version__ = "0.2.0"
__all__ = ["accelerate", "load"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "accelerate": "seglab.operators.acceleration",
        "load": "seglab.loading",
    },
)
