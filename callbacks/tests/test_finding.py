"""Fusions that must be found, with their slices; each proved by scaling the branches.

The proof knows nothing of the finder: if the slices it names are right, multiplying each branch by
a power of two and dividing its slice of the weight by the same changes no bit of the output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scale_equalization import find_fusions
from torch import Tensor, nn

SCALES = {"a": 4.0, "b": 0.5}
AB = [("a", 0, 4), ("b", 4, 10)]


class Toy(nn.Module):
    """Two branches in, `run` is the forward pass, the fusion layer is `fuse`."""

    def __init__(self, run: Callable[..., Tensor], fuse: nn.Module | None, **modules: nn.Module):
        super().__init__()
        self.run, self.fuse = run, fuse
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.run(self, a, b)


def conv(channels: int = 10, **options) -> nn.Module:
    return nn.Conv2d(channels, 6, **{"kernel_size": 3, "padding": 1, **options})


def branches(*size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = size or (8, 8)
    return tuple(torch.randn(2, width, *size, generator=generator) for width in (4, 6))


def divide_slices(weight: Tensor, slices, groups: int = 1, transposed: bool = False) -> None:
    """Divide what each branch is multiplied by; written out, channel by channel."""
    rows = weight.shape[0] if transposed else weight.shape[0] // groups
    for source, start, stop in slices:
        for channel in range(start, stop):
            if transposed:
                weight[channel] /= SCALES[source]
            else:
                group, inner = divmod(channel, weight.shape[1])
                weight[group * rows : (group + 1) * rows, inner] /= SCALES[source]


def check(net: nn.Module, inputs: tuple[Tensor, Tensor], expected, name: str = "fuse"):
    """The finder names these slices, and they are right."""
    net.eval()
    fusion = {f.name: f for f in find_fusions(net, *inputs)}[name]
    assert [(b.start, b.stop) for b in fusion.branches] == [(s, t) for _, s, t in expected]
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        weight = scaled.get_submodule(name).get_parameter(fusion.parameter)
        divide_slices(weight, expected, fusion.groups, fusion.transposed)
        torch.manual_seed(0)
        expected_output = net(*(x.clone() for x in inputs))
        torch.manual_seed(0)
        output = scaled(*(SCALES[key] * x for key, x in zip("ab", inputs, strict=True)))
    torch.testing.assert_close(output, expected_output, rtol=1e-5, atol=1e-6)
    return fusion


def cat(a: Tensor, b: Tensor, dim: int = 1) -> Tensor:
    return torch.cat([a, b], dim)


JOINS = {
    "cat": lambda a, b: torch.cat((a, b), 1),
    "cat by name": lambda a, b: torch.cat(tensors=[a, b], dim=-3),
    "concat": lambda a, b: torch.concat([a, b], dim=1),
    "concatenate": lambda a, b: torch.concatenate([a, b], axis=1),
    "hstack": lambda a, b: torch.hstack([a, b]),
    "out": lambda a, b: torch.cat([a, b], 1, out=torch.empty(0)),
    "aten": lambda a, b: torch.ops.aten.cat.default([a, b], 1),
    "with an empty skip": lambda a, b: torch.cat([a, a.new_empty(2, 0, 8, 8), b], 1),
    "nested": lambda a, b: torch.cat([torch.cat([a]), torch.cat([b[:, :2], b[:, 2:]], 1)], 1),
}


@pytest.mark.parametrize("join", JOINS)
def test_every_way_to_concatenate_is_found(join):
    slices = [("a", 0, 4), ("b", 4, 6), ("b", 6, 10)] if join == "nested" else AB
    check(Toy(lambda net, a, b: net.fuse(JOINS[join](a, b)), conv()), branches(), slices)


@pytest.mark.parametrize("dim", [1, 2])
def test_stack_and_flatten_is_found(dim):
    def run(net, a, b):
        return net.fuse(torch.stack([a, b[:, :4]], dim).flatten(1, 2))

    side_by_side, alternating = (
        [("a", 0, 4), ("b", 4, 8)],
        [("ab"[i % 2], i, i + 1) for i in range(8)],
    )
    check(Toy(run, conv(8)), branches(), side_by_side if dim == 1 else alternating)


BETWEEN = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "abs": torch.abs,
    "clamp at zero": lambda x: x.clamp(min=0),
    "dropout": lambda x: F.dropout2d(F.dropout(x, 0.5), 0.5),
    "dropout in place": lambda x: F.dropout3d(F.dropout(x, 0.5, inplace=True), inplace=True),
    "zero pad": lambda x: F.pad(x, (1, 2, 3, 4)),
    "reflect pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "circular pad": lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"),
    "resize": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "average pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "copy": lambda x: x.clone().contiguous(memory_format=torch.channels_last).detach(),
    "casts": lambda x: x.double().to(torch.float32).type_as(x).float(),
    "numbers": lambda x: (3 * x / -2.0).mul_(0.5).neg(),
    "axes to and fro": lambda x: x.permute(0, 2, 3, 1).transpose(1, 2).movedim(3, 1),
    "groups to and fro": lambda x: x.view(2, 2, 5, 8, 8).reshape(2, 10, 8, 8),
    "flat and back": lambda x: x.flatten(2).unflatten(2, (8, 8)),
    "squeezes": lambda x: x.unsqueeze(0).squeeze(0)[None][0],
    "crop": lambda x: x[..., 1:-1, ::2],
    "autocast": lambda x: x,
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_keeps_a_branch_scale_is_looked_through(between):
    def run(net, a, b):
        with torch.autocast("cpu", torch.bfloat16, enabled=between == "autocast"):
            return net.fuse(BETWEEN[between](cat(a, b))).float()

    check(Toy(run, conv()), branches(), AB)


MODULES = {
    "upsample": nn.Upsample(scale_factor=2),
    "prelu": nn.PReLU(10),
    "dropout": nn.Sequential(nn.Dropout(0.9), nn.Dropout2d(0.9), nn.AlphaDropout(0.9)),
    "identity": nn.Identity(),
    "pad": nn.ZeroPad2d(2),
    "pools": nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("between", MODULES)
def test_modules_between_are_looked_through(between):
    def run(net, a, b):
        return net.fuse(net.between(cat(a, b)))

    check(Toy(run, conv(), between=MODULES[between]), branches(), AB)


def test_learned_factors_between_are_looked_through():
    class Scaled(Toy):
        def __init__(self):
            super().__init__(None, conv())
            self.gamma = nn.Parameter(torch.randn(10))
            self.weights = nn.Parameter(torch.rand(2))

        def forward(self, a, b):
            share = F.relu(self.weights) / (self.weights.sum() + 1e-4)
            return self.fuse(share[0] * cat(a, b) * self.gamma.view(1, -1, 1, 1))

    check(Scaled(), branches(), AB)


SHUFFLED = {
    "flip": (lambda x: x.flip(1), [("b", 0, 6), ("a", 6, 10)]),
    "roll": (lambda x: x.roll(2, 1), [("b", 0, 2), ("a", 2, 6), ("b", 6, 10)]),
    "slice": (lambda x: x[:, 2:7], [("a", 0, 2), ("b", 2, 5)]),
    "narrow": (lambda x: x.narrow(1, 3, 4), [("a", 0, 1), ("b", 1, 4)]),
    "chunk": (lambda x: x.chunk(2, 1)[0], [("a", 0, 4), ("b", 4, 5)]),
    "split": (lambda x: x.split([2, 8], dim=1)[1], [("a", 0, 2), ("b", 2, 8)]),
    "select": (lambda x: x.index_select(1, torch.tensor([9, 0])), [("b", 0, 1), ("a", 1, 2)]),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), [*AB, ("a", 10, 14), ("b", 14, 20)]),
    "channel shuffle": (
        lambda x: F.channel_shuffle(x, 2),
        [*(("ab"[i % 2], i, i + 1) for i in range(7)), ("b", 7, 10)],
    ),
    "pixel shuffle": (
        lambda x: F.pixel_shuffle(torch.cat([x[:, :4], x[:, 4:8]], 1), 2),
        [("a", 0, 1), ("b", 1, 2)],
    ),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), [("a", 0, 16), ("b", 16, 40)]),
}
SHUFFLED["channel shuffle by hand"] = (
    lambda x: x.view(2, 2, 5, 8, 8).transpose(1, 2).reshape(2, 10, 8, 8),
    SHUFFLED["channel shuffle"][1],
)


@pytest.mark.parametrize("move", SHUFFLED)
def test_moved_channels_are_followed(move):
    function, slices = SHUFFLED[move]
    net = Toy(lambda net, a, b: net.fuse(function(cat(a, b))), conv(slices[-1][2]))
    check(net, branches(), slices)


def test_channel_shuffle_expectation_by_indices():
    """The list above, once more from the definition of a shuffle in two groups."""
    order = [group * 5 + i for i in range(5) for group in range(2)]
    sources = ["a" if channel < 4 else "b" for channel in order]
    for source, start, stop in SHUFFLED["channel shuffle"][1]:
        assert sources[start:stop] == [source] * (stop - start)


LAYERS = {
    "conv1d": (nn.Conv1d(10, 6, 3), (8,)),
    "conv3d": (nn.Conv3d(10, 6, 3), (5, 6, 7)),
    "grouped": (nn.Conv2d(10, 6, 3, groups=2), (8, 8)),
    "depthwise": (nn.Conv2d(10, 20, 3, groups=10), (8, 8)),
    "transposed": (nn.ConvTranspose2d(10, 6, 2, stride=2), (8, 8)),
    "transposed, grouped": (nn.ConvTranspose2d(10, 6, 3, groups=2), (8, 8)),
    "transposed1d": (nn.ConvTranspose1d(10, 6, 2), (8,)),
    "transposed3d": (nn.ConvTranspose3d(10, 6, 2), (3, 4, 5)),
    "reflecting": (nn.Conv2d(10, 6, 3, padding=1, padding_mode="reflect"), (8, 8)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_kind_of_convolution_is_found(layer):
    module, size = LAYERS[layer]
    fusion = check(Toy(lambda net, a, b: net.fuse(cat(a, b)), module), branches(*size), AB)
    assert fusion.groups == module.groups
    assert fusion.weight_shape == tuple(module.weight.shape)
    assert fusion.transposed == layer.startswith("transposed")


def test_unbatched_inputs_are_found():
    def run(net, a, b):
        return net.fuse(cat(a[0], b[0], 0))

    check(Toy(run, conv()), branches(), AB)


LINEAR = {
    "channels last": (lambda a, b: cat(a.permute(0, 2, 3, 1), b.movedim(1, 3), -1), 10),
    "permuted": (lambda a, b: cat(a, b).permute(0, 2, 3, 1), 10),
    "tokens": (lambda a, b: cat(a, b).flatten(2).transpose(1, 2), 10),
    "pooled": (lambda a, b: F.adaptive_avg_pool2d(cat(a, b), 1).flatten(1), 10),
    "mean": (lambda a, b: cat(a, b).mean((2, 3)), 10),
    "sum, kept": (lambda a, b: cat(a, b).sum(-1, keepdim=True).amax(2)[..., 0], 10),
    "vectors": (lambda a, b: cat(a.mean((2, 3)), b.mean((2, 3)), -1), 10),
    "pixels": (lambda a, b: cat(a, b).flatten(1), 640),
}


@pytest.mark.parametrize("form", LINEAR)
def test_linear_layers_are_found(form):
    function, width = LINEAR[form]
    net = Toy(lambda net, a, b: net.fuse(function(a, b)), nn.Linear(width, 3))
    per_channel = width // 10
    check(net, branches(), [(s, i * per_channel, j * per_channel) for s, i, j in AB])


def test_functional_convolution_with_a_parameter_is_found():
    class Functional(Toy):
        def __init__(self):
            super().__init__(None, nn.Module())
            self.fuse.kernel = nn.Parameter(torch.randn(6, 10, 3, 3))

        def forward(self, a, b):
            return F.conv2d(weight=self.fuse.kernel, input=cat(a, b), padding=1)

    assert check(Functional(), branches(), AB).parameter == "kernel"


def test_masks_and_counts_may_be_branches():
    def run(net, a, b):
        marks = torch.cat([b > 0, b > 1], 1)
        return net.fuse(torch.cat([a, marks.sum(1, keepdim=True), marks.float()], 1))

    (fusion,) = find_fusions(Toy(run, conv(17)), *branches())
    assert [branch.stop for branch in fusion.branches] == [4, 5, 17]


def test_one_concatenation_reaches_several_layers():
    def run(net, a, b):
        both = cat(a, b)
        return net.fuse(both) + net.other(F.relu(both))

    net = Toy(run, conv(), other=conv(kernel_size=1, padding=0))
    names = [fusion.name for fusion in find_fusions(net, *branches())]
    assert names == ["fuse", "other"]


def test_one_layer_called_several_times_is_one_fusion():
    def run(net, a, b):
        return net.fuse(cat(a, b)) + net.fuse(cat(a.flip(2), b.flip(2)))

    check(Toy(run, conv()), branches(), AB)
    assert len(find_fusions(Toy(run, conv()), *branches())) == 1


def test_one_layer_under_two_names_is_one_fusion():
    net = Toy(lambda net, a, b: net.alias(cat(a, b)), conv())
    net.alias = net.fuse
    check(net, branches(), AB)


def test_nested_fusions_name_what_is_upstream():
    def run(net, a, b):
        inner = F.relu(net.fuse(cat(a, b)))
        middle = net.middle(cat(inner, a))
        return net.outer(torch.cat([middle, F.gelu(inner), b], 1))

    net = Toy(run, conv(), middle=conv(10), outer=conv(18))
    found = {fusion.name: fusion.upstream for fusion in find_fusions(net, *branches())}
    assert found == {"fuse": (), "middle": ("fuse",), "outer": ("fuse", "middle")}


def test_operands_changed_in_place_after_the_concatenation_do_not_matter():
    def run(net, a, b):
        a, b = a * 1, b * 1
        both = cat(a, b)
        a.add_(100)
        b.zero_()
        return net.fuse(both)

    check(Toy(run, conv()), branches(), AB)
