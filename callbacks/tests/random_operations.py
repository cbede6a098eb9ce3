"""What may lie between a concatenation and its consumer in a random network."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gate(x, weights):
    return x * weights.sigmoid()


def write_data(x):
    y = x.clone()
    y.data.clamp_(max=0.7)
    return y


# Homogeneous, and every channel keeps its place.
STRAIGHT = {
    "relu": F.relu,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "double": lambda x: x * 2.0,
    "negative": lambda x: -x,
    "abs": torch.abs,
    "flip": lambda x: x.flip(-1),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "zero_pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "resample": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "nhwc and back": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "plus its relu": lambda x: x + x.relu(),
    "in place": lambda x: x.clone().mul_(3.0),
    "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=False),
}
# Homogeneous, and the channels move.
MOVING = {
    "swap halves": lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "reverse": lambda x: x.index_select(1, torch.arange(x.shape[1] - 1, -1, -1)),
    "shuffle": lambda x: x[:, torch.arange(x.shape[1]).roll(x.shape[1] // 3)],
    "interleave": lambda x: torch.stack([x, x.relu()], 2).flatten(1, 2),
    "unshuffle": lambda x: F.pixel_unshuffle(x, 2) if x.shape[-1] % 2 == 0 else x,
    "channel pad": lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)),
    "channel shift": lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1],
    "narrow": lambda x: x.narrow(1, 1, x.shape[1] - 1),
}
# A multiple of the input does not give the multiple of the output, or parts are mixed.
BREAKING = {
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "relu6": lambda x: F.relu6(x * 20),
    "floor divide": lambda x: x // 0.25,
    "round": lambda x: (x * 4).round(),
    "square": lambda x: x * x,
    "add one": lambda x: x + 1.0,
    "softmax": lambda x: x.softmax(1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "instance_norm": lambda x: F.instance_norm(x),
    "cumsum": lambda x: x.cumsum(1),
    "mean of channels": lambda x: x + x.mean(1, keepdim=True),
    "pool of channels": lambda x: F.max_pool1d(x.flatten(2).mT, 3, 1, 1).mT.reshape(x.shape),
    "roll added": lambda x: x + x.roll(1, 1),
    "threshold": lambda x: torch.where(x > 0.3, x, torch.zeros_like(x)),
    "own gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "data write": write_data,
}
