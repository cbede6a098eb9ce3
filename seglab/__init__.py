"""seglab: semantic-segmentation training whose numbers one can trust."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seglab.operators.acceleration import accelerate

__version__ = "0.1.0"
__all__ = ["accelerate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module("seglab.operators.acceleration"), name)
