"""Random networks of fusions: the same seed gives the same network.

A network is a list of steps; every step takes earlier wires and appends one. The generator runs
each step while it builds, so that it knows every shape. `simple` names the consumers of plain
concatenations that have to be folded; `program` prints what was built.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from random_operations import BREAKING, MOVING, STRAIGHT, gate
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class RandomNetwork(nn.Module):
    """Float64, input (4, 3, 8, 8); outputs are all wires that nothing takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.steps: list[tuple] = []
        self.simple: set[str] = set()
        self.outputs: list[int] = []

    def forward(self, x):
        wires = [x]
        for _, operation, sources in self.steps:
            wires.append(operation(self, *[wires[i] for i in sources]))
        return tuple(wires[i] for i in self.outputs)

    @property
    def program(self) -> str:
        lines = [f"{i}: {d} {s}" for i, (d, _, s) in enumerate(self.steps, 1)]
        return "\n".join([*lines, f"simple: {sorted(self.simple)}"])


def batches(seed: int, n: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 3, 8, 8)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + 0.3 * i) + 0.2
        for i in range(n)
    ]


class Generator:
    """Builds one RandomNetwork; `value` holds every wire for one batch."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.network = RandomNetwork().double()
        self.value = [batches(seed, 1)[0]]
        self.used: set[int] = set()

    def step(self, description, operation, *sources) -> int:
        with torch.no_grad():
            self.value.append(operation(self.network, *[self.value[i] for i in sources]))
        self.network.steps.append((description, operation, sources))
        self.used.update(sources)
        return len(self.value) - 1

    def layer(self, kind, module, *sources) -> int:
        name = f"{kind}{len(self.network.layers)}"
        self.network.layers[name] = module.double()
        describe = f"{name} = {type(module).__name__}{tuple(self.value[sources[0]].shape)}"
        return self.step(describe, lambda net, *x: net.layers[name](*x), *sources)

    @property
    def last_layer(self) -> str:
        return list(self.network.layers)[-1]

    def channels(self, wire) -> int:
        return self.value[wire].shape[1]

    # -- branches ----------------------------------------------------------------------------
    def stem(self) -> list[int]:
        levels, x = [], 0
        for _ in range(3):
            width = self.random.choice([3, 4, 6])
            conv = nn.Conv2d(self.channels(x), width, 3, self.random.choice([1, 2]), 1)
            x = self.layer("stem", conv, x)
            if self.random.random() < 0.7:
                x = self.step("leaky", lambda net, x: F.leaky_relu(x, 0.2), x)
            factor = self.random.choice([0.05, 1.0, 7.0])
            levels.append(self.step(f"x {factor}", lambda net, x, k=factor: x * k, x))
        return levels

    def branch(self, wire, size) -> int:
        """One part of a concatenation: resized, sometimes normalized, gated or summed."""
        is_vector = 1 in (self.value[wire].shape[2:].numel(), size.numel())
        if self.value[wire].shape[2:] != size:
            how = self.random.choice(["bilinear", "nearest", "pool"])
            if how == "pool":
                wire = self.step(how, lambda net, x: F.adaptive_avg_pool2d(x, size), wire)
            else:
                wire = self.step(
                    how, lambda net, x, m=how: F.interpolate(x, size=size, mode=m), wire
                )
        extra = self.random.choice(["", "", "", "norm", "gate", "sum", "drop", "gelu"])
        if extra == "norm":
            width = self.channels(wire)
            norms = [nn.BatchNorm2d(width), nn.GroupNorm(1, width), nn.InstanceNorm2d(width)]
            if is_vector:  # an instance normalization leaves rounding noise, or is an error
                norms.pop()
            return self.layer("norm", self.random.choice(norms), wire)
        if extra == "gate":
            weights = self.layer("attend", nn.Conv2d(self.channels(wire), 1, 1), wire)
            return self.step("gate", lambda net, x, w: gate(x, w), wire, weights)
        if extra == "sum":
            return self.step("sum", lambda net, x: x + x.flip(2), wire)
        if extra == "drop":
            return self.layer("drop", nn.Dropout2d(0.3), wire)
        if extra == "gelu":
            return self.step("gelu", lambda net, x: F.gelu(x), wire)
        return wire

    # -- concatenations ----------------------------------------------------------------------
    def concatenate(self, parts) -> int:
        how = self.random.choice(["plain", "plain", "plain", "nested", "repeated", "nhwc"])
        if how == "nested" and len(parts) > 2:
            inner = self.step("cat", lambda net, *x: torch.cat(x, 1), *parts[:2])
            parts = [inner, *parts[2:]]
        if how == "repeated":
            parts = [*parts, parts[0]]
        if how == "nhwc":

            def operation(net, *x):
                return torch.cat([y.permute(0, 2, 3, 1) for y in x], -1).permute(0, 3, 1, 2)

            return self.step("cat of nhwc", operation, *parts)
        if self.random.random() < 0.1:  # not a fusion: the batch twice, and back
            twice = self.step("batch twice", lambda net, x: torch.cat([x, x], 0)[4:], parts[-1])
            parts = [*parts[:-1], twice]
        return self.step("cat", lambda net, *x: torch.cat(x, 1), *parts)

    def between(self, wire) -> tuple[int, bool]:
        """What lies between concatenation and consumer; whether it is plain."""
        kinds = "plain plain plain plain drop straight moving breaking breaking gate"
        how = self.random.choice(kinds.split())
        if how == "plain":
            return wire, True
        if how == "drop":
            return self.layer("drop", nn.Dropout(0.2), wire), True
        if how == "gate":
            width = self.channels(wire)
            conv = nn.Conv2d(width, self.random.choice([1, width]), 1)
            weights = self.layer("attend", conv, wire)
            return self.step("gate", lambda net, x, w: gate(x, w), wire, weights), False
        if how == "breaking" and self.random.random() < 0.3:
            width = self.channels(wire)
            norm = self.random.choice([nn.BatchNorm2d(width), nn.GroupNorm(1, width)])
            return self.layer("norm", norm, wire), False
        operations = {"straight": STRAIGHT, "moving": MOVING, "breaking": BREAKING}[how]
        name = self.random.choice(sorted(operations))
        operation = operations[name]
        wire = self.step(name, lambda net, x: operation(x), wire)
        return wire, name == "relu"

    # -- consumers ---------------------------------------------------------------------------
    def consume(self, wire, plain: bool) -> int:
        width = self.channels(wire)
        kinds = "point point conv conv conv stride grouped depthwise up linear pooled token conv1d"
        kind = self.random.choice(kinds.split())
        out = self.random.choice([3, 4, 6])
        if kind in ("linear", "token", "pooled", "conv1d"):
            return self.consume_reshaped(wire, kind, width, plain)
        groups = width if kind == "depthwise" else 2 if kind == "grouped" and width % 2 == 0 else 1
        out = {"depthwise": width, "grouped": 4}.get(kind, out)
        conv = {
            "point": lambda: nn.Conv2d(width, out, 1),
            "stride": lambda: nn.Conv2d(width, out, 3, 2, 1, bias=False),
            "up": lambda: nn.ConvTranspose2d(width, out, 2, 2),
        }.get(kind, lambda: nn.Conv2d(width, out, 3, padding=1, groups=groups))()
        y = self.layer("fuse", conv, wire)
        name = self.last_layer
        tied = self.tie(name, wire, y)
        if plain and tied == y and groups == 1:
            self.network.simple.add(f"layers.{name}")
        return tied

    def consume_reshaped(self, wire, kind, width, plain: bool) -> int:
        """A Linear or Conv1d on another layout of the map, brought back to NCHW."""
        if kind == "pooled":
            how = self.random.choice([lambda x: x.mean((2, 3)), lambda x: x.amax((2, 3))])
            wire = self.step("reduce", lambda net, x: how(x), wire)
            y = self.layer("fuse", nn.Linear(width, 4), wire)
            return self.step("nchw", lambda net, x: x[:, :, None, None].expand(-1, -1, 4, 4), y)
        if kind == "conv1d":
            size = self.value[wire].shape[2:]
            wire = self.step("flatten", lambda net, x: x.flatten(2), wire)
            y = self.layer("fuse", nn.Conv1d(width, 4, 3, padding=1), wire)
            return self.step("nchw", lambda net, x: x.unflatten(2, size), y)
        if plain:
            self.network.simple.add(f"layers.fuse{len(self.network.layers)}")
        if kind == "token":
            size = self.value[wire].shape[2:]
            wire = self.step("tokens", lambda net, x: x.flatten(2).mT, wire)
            y = self.layer("fuse", nn.Linear(width, 4), wire)
            return self.step("nchw", lambda net, x: x.mT.unflatten(2, size), y)
        wire = self.step("nhwc", lambda net, x: x.permute(0, 2, 3, 1), wire)
        y = self.layer("fuse", nn.Linear(width, 5), wire)
        return self.step("nchw", lambda net, x: x.permute(0, 3, 1, 2), y)

    def tie(self, name, wire, y) -> int:
        """Sometimes another use of the consumer's weight, or a frozen or parametrized one."""
        how = self.random.choice([""] * 14 + ["twice", "penalty", "norm", "slice", "weight_norm"])
        layer = self.network.layers[name]
        transposed = isinstance(layer, nn.ConvTranspose2d)
        if how == "twice":
            again = self.step("again", lambda net, x: net.layers[name](x.flip(1)), wire)
            return self.step("sum", lambda net, a, b: a + b, y, again)
        if how == "penalty":
            return self.step(
                how, lambda net, x: x + 0.1 * net.layers[name].weight.square().sum(), y
            )
        if how == "norm":
            return self.step(how, lambda net, x: x * net.layers[name].weight.norm(), y)
        if how == "slice" and not transposed:
            return self.step(how, lambda net, x: x + net.layers[name].weight[:1, :1].mean(), y)
        if how == "weight_norm":
            weight_norm(layer)
            return self.step(how, lambda net, x: x.relu(), y)
        return y

    def after(self, wire) -> int:
        width = self.channels(wire)
        how = self.random.choice(["", "bn", "gn", "ln", "relu", "sigmoid", "squeeze"])
        if how == "bn":
            return self.layer("norm", nn.BatchNorm2d(width), wire)
        if how == "gn":
            return self.layer("norm", nn.GroupNorm(1, width), wire)
        if how == "ln":
            wire = self.step("nhwc", lambda net, x: x.permute(0, 2, 3, 1), wire)
            wire = self.layer("norm", nn.LayerNorm(width), wire)
            return self.step("nchw", lambda net, x: x.permute(0, 3, 1, 2), wire)
        if how == "squeeze":
            pooled = self.step("pool", lambda net, x: x.mean((2, 3)), wire)
            weights = self.layer("attend", nn.Linear(width, width), pooled)
            return self.step("gate", lambda net, x, w: gate(x, w[..., None, None]), wire, weights)
        if how in ("relu", "sigmoid"):
            return self.step(how, lambda net, x: getattr(torch, how)(x), wire)
        return wire

    def fusion(self, maps) -> list[int]:
        size = self.value[self.random.choice(maps)].shape[2:]
        chosen = self.random.sample(maps, self.random.choice([2, 2, 3]))
        joined = self.concatenate([self.branch(wire, size) for wire in chosen])
        if self.random.random() < 0.15:
            return self.split(joined)
        wire, plain = self.between(joined)
        if self.random.random() < 0.25:
            wire, also = self.between(wire)
            plain = plain and also
        made = [self.after(self.consume(wire, plain))]
        if self.random.random() < 0.2:  # a second consumer of the same concatenation
            made.append(self.consume(joined, True))
        return made

    def split(self, wire) -> list[int]:
        """Pieces of a concatenation, each with a consumer of its own; cuts fall anywhere."""
        width = self.channels(wire)
        how = self.random.choice(["split", "chunk", "slice"])
        cut = (width + 1) // 2 if how == "chunk" else self.random.randrange(1, width)
        made = []
        for k in (0, 1):
            pieces = {
                "split": lambda net, x, k=k: x.split([cut, width - cut], 1)[k],
                "chunk": lambda net, x, k=k: x.chunk(2, 1)[k],
                "slice": lambda net, x, k=k: x[:, :cut] if k == 0 else x[:, cut:],
            }
            piece = self.step(f"{how} at {cut}, piece {k}", pieces[how], wire)
            made.append(self.consume(piece, False))
        return made


def random_network(seed: int) -> RandomNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = Generator(seed)
        maps = made.stem()
        for _ in range(made.random.choice([1, 2, 2, 3])):
            maps += made.fusion(maps)
        made.network.outputs = [i for i in range(1, len(made.value)) if i not in made.used]
        return made.network.double()
