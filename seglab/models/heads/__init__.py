"""Decode heads: features of several levels in, logits at the head's resolution out."""

from seglab.models.heads.aspp import ASPPHead
from seglab.models.heads.base import Head
from seglab.models.heads.bifpn import BiFPNHead
from seglab.models.heads.fcn import FCNHead
from seglab.models.heads.psp import PSPHead
from seglab.models.heads.rsp import RSPHead
from seglab.models.heads.sep_aspp import SepASPPHead
from seglab.models.heads.uper import UPerHead

__all__ = [
    "ASPPHead",
    "BiFPNHead",
    "FCNHead",
    "Head",
    "PSPHead",
    "RSPHead",
    "SepASPPHead",
    "UPerHead",
]
