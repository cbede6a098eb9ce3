"""Ways by which the weights of a network come into another object."""

from __future__ import annotations

import copy
import io
import pickle
import re

import torch
from torch import nn
from toy_network import Toy, plain


def through_state_dict(net):
    fresh = Toy(plain, seed=8)
    fresh.load_state_dict(net.state_dict(), strict=True)
    return fresh


def through_file(net):
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = Toy(plain, seed=8)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return fresh


def through_prefix(net):
    """The network as a part of another one, as in a LightningModule's checkpoint."""
    outer, fresh = nn.ModuleDict({"network": net}), nn.ModuleDict({"network": Toy(plain, seed=8)})
    file = io.BytesIO()
    torch.save({"state_dict": outer.state_dict()}, file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    return fresh["network"]


def through_pickle(net):
    """Python's pickle; None where it is refused with the cure."""
    refused = None
    try:
        return pickle.loads(pickle.dumps(net))
    except (TypeError, AttributeError, RuntimeError, pickle.PicklingError) as error:
        refused = error
    assert re.search("bake_|state_dict", str(refused)), "no cure"
    return None


WAYS = {
    "itself": lambda net: net,
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "state dict": through_state_dict,
    "file": through_file,
    "prefixed file": through_prefix,
}
