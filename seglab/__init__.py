"""seglab: semantic-segmentation training whose numbers one can trust."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seglab.operators.acceleration import accelerate
    from seglab.predictor import load

__version__ = "0.2.0"
__all__ = ["accelerate", "load"]

_HOME = {"accelerate": "seglab.operators.acceleration", "load": "seglab.predictor"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_HOME[name]), name)
