"""Networks on which folding is wrong if decided by names: equal to the explicit form or refused.

One section for each kind of trap. "Refused" means: the layer keeps its weight, bit for bit, and the
error or the report names it with a reason.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from behaviour_oracle import run
from explicit_oracle import (
    attempt,
    check,
    difference,
    equal_or_refused,
    folded,
    mentions,
    refused_and_unchanged,
)
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from toy_network import Toy, cat, conv, data, linear, plain, pooled

# -- a weight that is used for anything else ---------------------------------------------------


def standardized(net, a, b):
    """Another use that does not see a factor on the whole weight, only ratios of slices."""
    weight = net.fuse1.weight
    return F.conv2d(cat(a, b), weight / weight.std(), padding=1)


ELSEWHERE = {
    "transposed": lambda net, a, b: F.conv_transpose2d(plain(net, a, b), net.fuse1.weight),
    "norm of the weight": lambda net, a, b: plain(net, a, b) * net.fuse1.weight.norm(),
    "norm by function": lambda net, a, b: plain(net, a, b) / torch.linalg.norm(net.fuse1.weight),
    "slice": lambda net, a, b: plain(net, a, b) + F.conv2d(a, net.fuse1.weight[:, :4], padding=1),
    "penalty": lambda net, a, b: (plain(net, a, b), 0.1 * net.fuse1.weight.square().sum()),
    "detached": lambda net, a, b: plain(net, a, b) + net.fuse1.weight.detach().mean(),
    "data": lambda net, a, b: plain(net, a, b) + net.fuse1.weight.data[0, 0, 0, 0],
    "sign": lambda net, a, b: plain(net, a, b) + net.fuse1.weight.abs().max(),
    "through numpy": lambda net, a, b: plain(net, a, b) + net.fuse1.weight.detach().numpy().max(),
    "a copy": lambda net, a, b: (
        plain(net, a, b) + F.conv2d(b, net.fuse1.weight.clone()[:, 4:], padding=1)
    ),
    "on another input": lambda net, a, b: plain(net, a, b) + net.fuse1(torch.tanh(cat(a, b))),
    "standardized": lambda net, a, b: plain(net, a, b) + standardized(net, a, b),
    "of all parameters": lambda net, a, b: (
        plain(net, a, b) + sum(p.sum() for p in net.parameters())
    ),
}


@pytest.mark.parametrize("use", ELSEWHERE)
def test_weight_used_elsewhere_is_refused(use):
    reason = refused_and_unchanged(Toy(ELSEWHERE[use]), data())
    assert reason


def test_linear_weight_tied_as_decoder_is_refused():
    def tied(net, a, b):
        x = pooled(cat(a, b))
        return F.linear(net.fuse1(x), net.fuse1.weight.t())

    refused_and_unchanged(Toy(tied, linear()), data())


def test_parameter_of_two_layers_is_refused():
    def two(net, a, b):
        return plain(net, a, b) + net.other(cat(b.tanh(), a.tanh()))

    net = Toy(two, other=conv())
    net.other.weight = net.fuse1.weight
    refused_and_unchanged(net, data())


def test_buffer_that_views_the_weight_is_refused():
    net = Toy(lambda net, a, b: plain(net, a, b) + F.conv2d(a, net.view, padding=1))
    net.register_buffer("view", net.fuse1.weight.detach()[:, :4])
    refused_and_unchanged(net, data())


@pytest.mark.parametrize("parametrize", [weight_norm, spectral_norm])
def test_parametrized_weight_is_equal_or_refused(parametrize):
    net = Toy(plain, parametrize(conv()))
    before = copy.deepcopy(net)
    report, error = attempt(net, data())
    if "fuse1" in folded(report):
        check(before, net, report, data())
    else:
        assert mentions(error if report is None else report, "fuse1")


# -- slices: the std is that of what the consumer takes ----------------------------------------


def uneven(a):
    """Four channels, of which the last are a hundred times the first."""
    return a * torch.tensor([1.0, 1.0, 100.0, 100.0], dtype=a.dtype)[:, None, None]


def pieces(take):
    def operation(net, a, b):
        one, two = take(cat(uneven(a), b))[:2]
        return net.first(one) + net.fuse1(two)

    return operation


SLICES = {
    "split": (lambda x: x.split([3, 5], 1), 3, 5),
    "tensor_split": (lambda x: x.tensor_split((2,), 1), 2, 6),
    "chunk": (lambda x: x.narrow(1, 0, 6).chunk(2, 1), 3, 3),
    "narrow": (lambda x: (x.narrow(1, 0, 5), x.narrow(1, 2, 6)), 5, 6),
    "slice": (lambda x: (x[:, :6], x[:, 2:]), 6, 6),
    "regrouped": (lambda x: (x[:, 1:7].unflatten(1, (2, 3)).flatten(1, 2), x[:, 2:7]), 6, 5),
    "overlapping": (lambda x: (x[:, 3:6], x[:, 3:8]), 3, 5),
}


@pytest.mark.parametrize("how", SLICES)
def test_slices_are_measured_as_taken(how):
    take, first, second = SLICES[how]
    net = Toy(pieces(take), conv(second), first=conv(first))
    report = equal_or_refused(net, data())
    assert "fuse1" in folded(report)


def test_crossed_concatenations_are_measured_as_taken():
    def crossed(net, a, b):
        there, back = cat(uneven(a), b), cat(b, uneven(a))
        mixed = torch.cat([there[:, 2:6], back[:, 2:6]], 1)
        return net.first(there) + net.fuse1(mixed)

    report = equal_or_refused(Toy(crossed, first=conv()), data())
    assert "first" in folded(report)


def test_readout_token_is_measured_as_taken():
    """A token of tiny scale in a concatenation along the sequence, then beside every patch."""

    def readout(net, a, b):
        patches = (0.5 * b + a).flatten(2).mT
        token = 0.0006 * net.token.expand(len(a), 1, 4) * a.std()
        sequence = torch.cat([token, patches], 1)
        beside = sequence[:, :1].expand_as(sequence[:, 1:])
        return net.fuse1(torch.cat([sequence[:, 1:], beside], -1))

    net = Toy(readout, linear())
    net.token = nn.Parameter(torch.randn(1, 1, 4, dtype=torch.float64))
    report = equal_or_refused(net, data())
    assert "fuse1" in folded(report)


PERMUTATIONS = {
    "halves": [4, 5, 6, 7, 0, 1, 2, 3],
    "reversed": [7, 6, 5, 4, 3, 2, 1, 0],
    "rolled": [6, 7, 0, 1, 2, 3, 4, 5],
    "interleaved": [0, 4, 1, 5, 2, 6, 3, 7],
    "repeated": [0, 0, 0, 0, 4, 4, 1, 1],
}


@pytest.mark.parametrize("order", PERMUTATIONS)
def test_permuted_channels_are_equal_or_refused(order):
    index = torch.tensor(PERMUTATIONS[order])
    for select in (lambda x: x.index_select(1, index), lambda x: x[:, index]):
        net = Toy(lambda net, a, b, s=select: net.fuse1(s(cat(uneven(a), b))))
        before = copy.deepcopy(net)
        report = equal_or_refused(net, data())
        if "fuse1" not in folded(report):
            refused_and_unchanged(before, data())


# -- center: means can be folded only through linear steps that keep constants -----------------

CENTER = {
    "relu": (F.relu, None),
    "doubled": (lambda x: 2 * x, None),
    "zero padding between": (lambda x: F.pad(x, (2, 2, 2, 2)), None),
    "average1 pool with padding": (lambda x: F.avg_pool2d(x, 3, 1, 1), None),
    "max pool": (lambda x: F.max_pool2d(x, 3, 1), None),
    "difference": (lambda x: x[..., 1:] - x[..., :-1], None),
    "leaky": (lambda x: F.leaky_relu(x, 0.1), None),
    "sum of pixels": (lambda x: F.avg_pool2d(x, 2, divisor_override=1), None),
    "gate": (lambda x: x * x.detach().mean().sigmoid(), None),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), None),
    "transposed, stride 2": (lambda x: x, nn.ConvTranspose2d(8, 4, 3, 2)),
    "transposed, stride 2, kernel 2": (lambda x: x, nn.ConvTranspose2d(8, 4, 2, 2)),
    "transposed, stride 1": (lambda x: x, nn.ConvTranspose2d(8, 4, 3, 1, 1)),
    "transposed, groups": (lambda x: x, nn.ConvTranspose2d(8, 4, 3, 2, groups=2)),
    "grouped": (lambda x: x, nn.Conv2d(8, 4, 3, groups=2)),
    "dilated": (lambda x: x, nn.Conv2d(8, 4, 3, dilation=2)),
    "without bias": (lambda x: x, nn.Conv2d(8, 4, 3, padding=1, bias=False)),
    "reflected borders": (lambda x: x, nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")),
    "plain": (lambda x: x, None),
}


class Centered(torch.overrides.TorchFunctionMode):
    """(part - mean) / std for the parts of the only concatenation, as the report's rows say."""

    def __init__(self, rows) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.cat:
            parts = zip(args[0], self.rows, strict=True)
            args = ([(x - row["mean"]) / row["std"] for x, row in parts], *args[1:])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("step", CENTER)
def test_center_is_equal_inside_or_refused(step):
    between, layer = CENTER[step]
    net = Toy(lambda net, a, b: net.fuse1(between(cat(a + 3.0, b))), copy.deepcopy(layer))
    before, batches = copy.deepcopy(net), data(size=16)
    report, error = attempt(net, batches, center=True)
    if "fuse1" not in folded(report):
        assert step != "plain"
        assert mentions(error if report is None else report, "fuse1")
        assert torch.equal(net.fuse1.weight, before.fuse1.weight)
        return
    if getattr(net.fuse1, "bias", None) is None or not report.center:
        assert mentions(report, "center"), "the means were left out in silence"
        return
    for batch in batches:
        with Centered(report.rows):
            expected = run(before, batch)[0]
        ours = run(net, batch)[0]
        border = 6 if ours.shape[-1] > 12 else 3
        inside = (..., slice(border, -border), slice(border, -border))
        assert difference([ours[inside]], [expected[inside]]) < 1e-9


# -- homogeneous by name only ------------------------------------------------------------------


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-0.3, 0.3)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def overwrite(x, how):
    y = x.clone()
    how(y)
    return y


BY_NAME = {
    "floor division": lambda x: x // 0.5,
    "rounded division": lambda x: torch.div(x, 0.5, rounding_mode="trunc"),
    "remainder": lambda x: x % 1.0,
    "divided by itself": lambda x: x / x.abs().amax((1, 2, 3), keepdim=True),
    "inverse": lambda x: 1.0 / (x.abs() + 1.0),
    "clamp in place": lambda x: overwrite(x, lambda y: y.clamp_(max=0.2)),
    "data write": lambda x: overwrite(x, lambda y: y.data.copy_(y.data.tanh())),
    "data attribute": lambda x: overwrite(x, lambda y: setattr(y, "data", y.data.sigmoid())),
    "numpy round trip": lambda x: torch.from_numpy(x.detach().numpy().round(1)),
    "shared numpy": lambda x: overwrite(x, lambda y: y.detach().numpy().__ifloordiv__(0.2)),
    "python function": Clamped.apply,
    "maximum with a constant": lambda x: torch.maximum(x, torch.tensor(0.4, dtype=x.dtype)),
    "where": lambda x: torch.where(x > 0.5, x, 0.1 * x),
    "masked fill": lambda x: x.masked_fill(x > 0.5, 0.0),
    "hard shrink": lambda x: F.hardshrink(x, 0.5),
    "pooling over channels": lambda x: F.max_pool1d(x.flatten(2).mT, 3, 1, 1).mT.reshape(x.shape),
    "3-D pooling": lambda x: F.avg_pool3d(x[:, None], 3, 1, 1)[:, 0],
    "sorted channels": lambda x: x.sort(1).values,
    "lerp": lambda x: torch.lerp(x, torch.ones_like(x), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "to int and back": lambda x: (x * 20).to(torch.int32).double(),
    "quantized": lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -9, 9).double(),
    "topk mask": lambda x: x * (x > x.flatten(1).quantile(0.5)),
    "mixed channels": lambda x: x + x.flip(1),
    "shifted mean": lambda x: x - x.mean(1, keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("operation", BY_NAME)
def test_operation_homogeneous_by_name_is_refused(operation):
    between = BY_NAME[operation]
    net = Toy(lambda net, a, b: net.fuse1(between(cat(a, b))))
    refused_and_unchanged(net, data())


def test_channel_shifting_pad_is_equal_or_refused():
    def shifted(net, a, b):
        return net.fuse1(F.pad(cat(a, b), (0, 0, 0, 0, 1, 0))[:, :8])

    before = Toy(shifted)
    report = equal_or_refused(copy.deepcopy(before), data())
    if "fuse1" not in folded(report):
        refused_and_unchanged(before, data())


def test_nonlinearity_of_later_batches_is_refused():
    def sometimes(net, a, b):
        x = cat(a, b)
        return net.fuse1(x.sigmoid() if a.abs().max() > 3.0 else x)

    batches = data(4)
    batches[2:] = [100.0 * x for x in batches[2:]]
    refused_and_unchanged(Toy(sometimes), batches)


def test_use_of_the_weight_in_later_batches_is_refused():
    def sometimes(net, a, b):
        y = plain(net, a, b)
        return y * net.fuse1.weight.norm() if a.abs().max() > 3.0 else y

    batches = data(4)
    batches[3] = 100.0 * batches[3]
    refused_and_unchanged(Toy(sometimes), batches)
