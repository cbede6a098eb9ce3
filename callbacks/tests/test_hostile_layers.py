"""Kinds of layers, weights and batches: each is equal to the explicit form or refused aloud."""

from __future__ import annotations

import copy
import warnings
from collections import UserDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from explicit_oracle import check, difference, folded
from scale_equalization import ScaleEqualizationError, equalize_
from torch import nn
from torch.nn.utils import parametrizations, prune
from toy_network import Toy, cat, conv, data, linear, plain


def last(a, b):
    return cat(a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1), -1)


LAYERS = {
    "Linear, channels last": (lambda net, a, b: net.fuse1(last(a, b)), linear()),
    "Conv1d": (lambda net, a, b: net.fuse1(cat(a.flatten(2), b.flatten(2))), nn.Conv1d(8, 4, 3)),
    "Conv3d": (
        lambda net, a, b: net.fuse1(cat(a[:, :, None], b[:, :, None])),
        nn.Conv3d(8, 4, (1, 3, 3)),
    ),
    "ConvTranspose1d": (
        lambda net, a, b: net.fuse1(cat(a.flatten(2), b.flatten(2))),
        nn.ConvTranspose1d(8, 4, 3, 2),
    ),
    "ConvTranspose2d, 2 groups": (plain, nn.ConvTranspose2d(8, 6, 3, 2, groups=2)),
    "ConvTranspose2d, 4 groups": (plain, nn.ConvTranspose2d(8, 8, 3, 2, groups=4)),
    "ConvTranspose3d": (
        lambda net, a, b: net.fuse1(cat(a[:, :, None], b[:, :, None])),
        nn.ConvTranspose3d(8, 4, 2),
    ),
    "grouped, dilated": (plain, nn.Conv2d(8, 4, 3, dilation=2, groups=2)),
    "circular padding": (plain, conv(padding_mode="circular")),
    "called twice": (lambda net, a, b: net.fuse1(cat(a, b)) + net.fuse1(cat(b, a)), conv()),
    "functional call": (
        lambda net, a, b: torch.func.functional_call(
            net.fuse1, dict(net.fuse1.named_parameters()), (cat(a, b),)
        ),
        conv(),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_equals_the_explicit_form(kind):
    run, layer = LAYERS[kind]
    net = Toy(run, layer)
    before = copy.deepcopy(net)
    report = equalize_(net, data(), tolerance=0)
    assert folded(report) == {"fuse1"}
    check(before, net, report, data())


def standardized(net, a, b):
    weight = net.fuse1.weight
    return F.conv2d(cat(a, b), weight / weight.std((1, 2, 3), keepdim=True), padding=1)


COMPUTED = {
    "weight_norm": (plain, lambda: parametrizations.weight_norm(conv())),
    "spectral_norm": (plain, lambda: parametrizations.spectral_norm(conv())),
    "orthogonal": (
        lambda net, a, b: net.fuse1(last(a, b)),
        lambda: parametrizations.orthogonal(linear()),
    ),
    "old weight_norm": (plain, lambda: nn.utils.weight_norm(conv())),
    "old spectral_norm": (plain, lambda: nn.utils.spectral_norm(conv())),
    "pruned": (plain, lambda: prune.random_unstructured(conv(), "weight", 0.3)),
    "times a number": (
        lambda net, a, b: F.conv2d(cat(a, b), 2.0 * net.fuse1.weight, padding=1),
        conv,
    ),
    "reshaped": (
        lambda net, a, b: F.linear(last(a, b), net.fuse1.weight.flatten(1)),
        lambda: conv(size=1),
    ),
    "standardized": (standardized, conv),
}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused_and_stay(kind):
    """Beside a plain fusion, so that a layer that is passed over would be noticed."""
    run, make = COMPUTED[kind]
    net = Toy(lambda net, a, b: (net.other(cat(a, b)), run(net, a, b)), make(), other=conv())
    before = {name: values.clone() for name, values in net.state_dict().items()}
    report = equalize_(net, data(), tolerance=0)
    assert folded(report) == {"other"}
    changed = {n for n, values in net.state_dict().items() if not torch.equal(values, before[n])}
    assert changed == {"other.weight"}
    reasons = [refusal.reason for refusal in report.refusals]
    assert any("parametrized" in text or "computed" in text for text in reasons)


def test_lazy_layers_are_refused_uninitialized():
    net = Toy(plain, nn.LazyConv2d(4, 3))
    with pytest.raises(ScaleEqualizationError, match="not initialized yet"):
        equalize_(net, data())
    assert isinstance(net.fuse1.weight, nn.UninitializedParameter)


QUANTIZERS = {"dynamic": "several maps|quantized|not followed", "in training": "computed"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantized_layers_are_refused_with_their_statistics_kept(kind):
    ao = torch.ao.quantization
    net = Toy(lambda net, a, b: net.fuse1(last(a, b)), linear()).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "dynamic":
            net = ao.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
        else:
            net.qconfig = ao.get_default_qat_qconfig("fbgemm")
            ao.prepare_qat(net.train(), inplace=True)
    before = {n: v.clone() for n, v in net.state_dict().items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ScaleEqualizationError, match=QUANTIZERS[kind]):
        equalize_(net, [x.float() for x in data()])
    after = net.state_dict()
    assert all(after[n].shape == v.shape and torch.equal(after[n], v) for n, v in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_measures_and_changes_the_float32_weight(dtype):
    def cast(net, a, b):
        with torch.autocast("cpu", dtype):
            return plain(net, a, b)

    net = Toy(cast).float()
    before = copy.deepcopy(net)
    report = equalize_(net, [x.float() for x in data()], tolerance=0)
    for row in report.rows:
        with torch.no_grad():
            parts = torch.cat([cat(*before.parts(x.float())) for x in data()])
        std = parts[:, row["start"] : row["stop"]].double().std(correction=0)
        assert row["std"] == pytest.approx(float(std), rel=0.01)
        slices = (n.fuse1.weight[:, row["start"] : row["stop"]] for n in (net, before))
        now, then = slices
        assert torch.allclose(now, then / row["std"], rtol=1e-6)


def test_channels_last_memory_changes_nothing():
    nets = [Toy(plain), Toy(plain).to(memory_format=torch.channels_last)]
    rows = []
    for net in nets:
        batches = [x.contiguous(memory_format=torch.channels_last) for x in data()]
        rows.append(equalize_(net, batches if net is nets[1] else data(), tolerance=0).rows)
    assert [r["std"] for r in rows[0]] == pytest.approx([r["std"] for r in rows[1]], rel=1e-12)
    assert nets[1].fuse1.weight.is_contiguous(memory_format=torch.channels_last)
    assert difference([nets[0].fuse1.weight], [nets[1].fuse1.weight]) < 1e-12


@pytest.mark.parametrize("options", [{}, {"center": True}, {"mode": "reparametrize"}], ids=str)
def test_default_device_and_dtype_of_the_user_do_not_matter(options):
    """As after torch.set_default_device("cuda"): what the package makes is where it belongs."""
    net = Toy(plain, conv(padding_mode="circular"))
    replica = copy.deepcopy(net)
    batches = data()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            report = equalize_(net, batches, tolerance=0, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = equalize_(replica, batches, tolerance=0, **options)
    assert report.rows == expected.rows
    assert difference([net.fuse1.weight], [replica.fuse1.weight]) == 0.0


@pytest.mark.parametrize("what", ["function", "layer", "stem"])
def test_compiled_parts_are_seen_through(what):
    joined = torch.compile(cat, backend="eager") if what == "function" else cat
    net, replica = Toy(lambda net, a, b: net.fuse1(joined(a, b))), Toy(plain)
    name = {"layer": "fuse1", "stem": "left"}.get(what)
    if name:
        setattr(net, name, torch.compile(getattr(net, name), backend="eager"))
    for each in (net, replica):
        equalize_(each, data(), tolerance=0)
    inner = getattr(net.fuse1, "_orig_mod", net.fuse1)
    assert difference([inner.weight], [replica.fuse1.weight]) < 1e-12


Pair = namedtuple("Pair", ["image", "mask"])
BATCHES = {
    "mapping": (lambda x: {"mask": x[:, 0], "image": x}, None),
    "other mapping": (lambda x: UserDict(pixel_values=x, labels=x[:, 0]), None),
    "tuple": (lambda x: (x, x[:, 0]), None),
    "named tuple": (lambda x: Pair(x, x[:, 0]), None),
    "nested": (lambda x: [{"x": x}, ["a", "b"]], None),
    "by forward": (lambda x: {"a": {"b": [x]}}, lambda model, batch: model(batch["a"]["b"][0])),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_every_form_measure_alike(kind):
    wrap, forward = BATCHES[kind]
    net, replica = Toy(plain), Toy(plain)
    report = equalize_(net, [wrap(x) for x in data()], tolerance=0, forward=forward)
    expected = equalize_(replica, data(), tolerance=0)
    assert [r["std"] for r in report.rows] == pytest.approx([r["std"] for r in expected.rows])
    assert difference([net.fuse1.weight], [replica.fuse1.weight]) < 1e-12
