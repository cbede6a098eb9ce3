"""Feature pyramids between encoder and decode head: levels in, levels of one width out."""

from seglab.models.necks.base import Neck
from seglab.models.necks.bifpn import BiFPN
from seglab.models.necks.fpn import FPN

__all__ = ["FPN", "BiFPN", "Neck"]
