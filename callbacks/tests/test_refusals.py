"""What must be left alone, each with the right reason; and what is no fusion of channels at all."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from scale_equalization import NoFusionError, equalize_, find_fusions
from scale_equalization.finding import examine
from torch import nn
from torch.nn.utils import parametrizations


class Net(nn.Module):
    """`run(net, a, b)` with two maps of 4 channels; `fuse` takes all 8."""

    def __init__(self, run, fuse=None, **modules) -> None:
        super().__init__()
        self.run = run
        self.fuse = nn.Conv2d(8, 4, 1) if fuse is None else fuse
        self.weight = nn.Parameter(torch.randn(8, 8))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, a, b):
        return self.run(self, a, b)


@pytest.fixture
def maps():
    return torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)


def cat(a, b, dim=1):
    return torch.cat([a, b], dim)


def refusals(net, maps, **options) -> dict[str, str]:
    found = examine(net, lambda: net(*maps), **options)
    assert found.fusions == ()
    return {refusal.name: refusal.reason for refusal in found.refusals}


BETWEEN = {
    "gate": (lambda net, x: x * x.mean((2, 3), keepdim=True).sigmoid(), r"product .* \(mul\)"),
    "gate in place": (lambda net, x: x.mul_(torch.sigmoid(x)), r"product .* \(mul\)"),
    "own mean": (lambda net, x: x / x.mean(), r"product .* \(div\)"),
    "inverse": (lambda net, x: torch.ones(8, 1, 1) / x, r"product .* \(div\)"),
    "square": (lambda net, x: x**2, r"product .* \(pow\)"),
    "softmax": (lambda net, x: x.softmax(1), r"product .* \(softmax\)"),
    "batch norm": (lambda net, x: net.norm(x), r"normalization \(batch_norm\).*already removes"),
    "group norm": (lambda net, x: F.group_norm(x, 2), r"normalization \(group_norm\)"),
    "layer norm": (lambda net, x: F.layer_norm(x, (8, 8)), r"normalization \(layer_norm\)"),
    "L2 norm": (lambda net, x: F.normalize(x), r"normalization \(normalize\)"),
    "sum": (lambda net, x: x + x.flip(1), r"sum \(add\).*other summand"),
    "sum in place": (lambda net, x: x.sub_(1.0), r"sum \(sub\)"),
    "GELU": (lambda net, x: F.gelu(x), r"operation gelu .* does not pass"),
    "hard tanh": (lambda net, x: F.relu6(x), r"operation relu6"),
    "clamp": (lambda net, x: x.clamp(min=-1), r"operation clamp"),
    "padding with ones": (lambda net, x: F.pad(x, (1, 1), value=1.0), r"constants lie among"),
    "rounding cast": (lambda net, x: x.to(torch.int8).float(), r"operation to "),
    "a view written to": (
        lambda net, x: (x[:, :2].sigmoid_(), x)[1],
        r"written to in place, through a view",
    ),
    "a slice assigned": (lambda net, x: (x.__setitem__((0,), 1.0), x)[1], r"constants lie among"),
    "first of two": (lambda net, x: F.gelu(F.layer_norm(x, (8, 8))), r"normalization"),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_changes_a_branch_scale_is_named(between, maps):
    function, reason = BETWEEN[between]
    net = Net(lambda net, a, b: net.fuse(function(net, cat(a, b))), norm=nn.BatchNorm2d(8))
    found = refusals(net, maps)
    assert list(found) == ["fuse"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found["fuse"])
    with pytest.raises(NoFusionError, match="fuse"):
        find_fusions(net, *maps)


def depthwise(**options):
    return nn.Conv2d(8, 8, 3, padding=1, groups=8, **options)


LAYERS = {
    "depthwise and norm": (nn.Sequential(depthwise(), nn.BatchNorm2d(8)), "fuse.0", "fuse.1"),
    "depthwise, ReLU and norm": (
        nn.Sequential(depthwise(), nn.ReLU(), nn.BatchNorm2d(8)),
        "fuse.0",
        "depthwise, followed by its own normalization fuse.2",
    ),
    "grouped by branch and norm": (
        nn.Sequential(nn.Conv2d(8, 4, 1, groups=2), nn.InstanceNorm2d(4)),
        "fuse.0",
        "a factor cancels",
    ),
    "weight norm": (parametrizations.weight_norm(nn.Conv2d(8, 4, 1)), "fuse", "parametrized"),
    "spectral norm": (parametrizations.spectral_norm(nn.Conv2d(8, 4, 1)), "fuse", "parametrized"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_that_cannot_take_a_scale_are_named(layer, maps):
    module, name, reason = LAYERS[layer]
    found = refusals(Net(lambda net, a, b: net.fuse(cat(a, b)), module), maps)
    assert reason in found.pop(name)
    assert not found


@pytest.mark.parametrize("layer", [depthwise(), nn.Conv2d(8, 4, 1, groups=4), nn.Conv2d(8, 4, 1)])
def test_layers_whose_groups_matter_are_no_refusals(layer, maps):
    tail = (
        [nn.BatchNorm2d(layer.out_channels)]
        if layer.groups < 4
        else [nn.Conv2d(layer.out_channels, 4, 1)]
    )
    net = Net(lambda net, a, b: net.fuse(cat(a, b)), nn.Sequential(layer, *tail))
    assert find_fusions(net, *maps)[0].name == "fuse.0"


def test_old_weight_norm_is_a_computed_weight(maps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Conv2d(8, 4, 1))
    found = refusals(Net(lambda net, a, b: net.fuse(cat(a, b)), layer), maps)
    assert "computed (by weight_norm, a cast" in found["fuse"]


def test_two_computed_weights_are_two_refusals(maps):
    layers = {n: parametrizations.weight_norm(nn.Conv2d(8, 4, 1)) for n in ("one", "two")}
    net = Net(lambda net, a, b: net.one(cat(a, b)) + net.two(cat(a, b)), **layers)
    assert set(refusals(net, maps)) == {"one", "two"}


def test_a_fixed_kernel_is_no_parameter(maps):
    class Blur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.ones(8, 1, 3, 3) / 9)

        def forward(self, x):
            return F.conv2d(x, self.kernel, groups=8)

    found = refusals(Net(lambda net, a, b: net.fuse(cat(a, b)), Blur()), maps)
    assert "is a buffer" in found["fuse"]


def test_weights_shared_with_the_encoder_are_refused(maps):
    net = Net(None, nn.Conv2d(8, 8, 1), encoder=nn.Conv2d(8, 8, 1))
    net.fuse.weight = net.encoder.weight
    net.run = lambda net, a, b: net.fuse(cat(net.encoder(b.repeat(1, 2, 1, 1))[:, :4], a))
    assert refusals(net, maps)["fuse"] == "its weight is shared with encoder.weight"


def test_weights_in_the_same_memory_are_refused(maps):
    net = Net(lambda net, a, b: net.fuse(cat(a, b)), replica=nn.Conv2d(8, 4, 1))
    net.replica.weight = nn.Parameter(net.fuse.weight.data)
    assert refusals(net, maps)["fuse"] == "its weight is shared with replica.weight"


def test_neighbours_in_one_flat_memory_are_not_shared(maps):
    net = Net(lambda net, a, b: net.fuse(cat(a, b)), other=nn.Conv2d(8, 4, 1))
    parameters = list(net.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters), parameters)
    assert find_fusions(net, *maps)[0].name == "fuse"


def test_a_weight_used_on_other_inputs_is_refused(maps):
    net = Net(lambda net, a, b: net.fuse(cat(a, b)) + net.fuse(a.repeat(1, 2, 1, 1)))
    assert "not this concatenation" in refusals(net, maps)["fuse"]
    net.run = lambda net, a, b: net.fuse(cat(a, b)) + net.fuse(cat(cat(a, b)[:, :5], b[:, 1:]))
    assert "different widths" in refusals(net, maps)["fuse"]


def test_two_weights_of_one_module_are_refused(maps):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(4, 8, 1, 1)) for _ in range(2))

        def forward(self, x):
            return F.conv2d(x, self.first) + F.conv2d(x, self.second)

    found = refusals(Net(lambda net, a, b: net.fuse(cat(a, b)), Both()), maps)
    assert "give each weight a module of its own" in found["fuse"]


def test_vmapped_and_complex_layers_are_refused(maps):
    net = Net(lambda net, a, b: torch.vmap(lambda a, b: net.fuse(cat(a, b, 0)))(a, b))
    assert "torch.func" in refusals(net, maps)["fuse"]
    net = Net(
        lambda net, a, b: net.fuse(cat(torch.complex(a, b), torch.complex(b, a))),
        nn.Conv2d(8, 4, 1, dtype=torch.complex64),
    )
    assert "complex" in refusals(net, maps)["fuse"]


def test_branches_that_change_places_between_images_are_refused(maps):
    net = Net(lambda net, a, b: net.fuse(torch.cat([cat(a, b), cat(b, a)], 0)))
    assert "differently from position to position" in refusals(net, maps)["fuse"]
    net.run = lambda net, a, b: net.fuse(torch.cat([cat(a, b), cat(b, a)], 0).chunk(2)[1])
    assert find_fusions(net, *maps)[0].name == "fuse"


def test_very_fine_interleaving_is_refused():
    maps = torch.randn(1, 40, 2, 2), torch.randn(1, 40, 2, 2)
    net = Net(lambda net, a, b: net.fuse(F.channel_shuffle(cat(a, b), 2)), nn.Conv2d(80, 4, 1))
    assert refusals(net, maps)["fuse"] == "its branches are interleaved in 80 slices, more than 64"


def positions():
    rows = torch.arange(8.0).view(8, 1, 1).expand(8, 8, 2)
    return torch.cat([rows, rows.transpose(0, 1).sin()], -1)  # (8, 8, 4), of no image


SILENT = {
    "tokens": lambda net, a, b: net.linear(cat(a[:, :1].flatten(2), b.flatten(2))),
    "tokens through a residual": lambda net, a, b: net.linear(
        (lambda x: x + F.layer_norm(x, (64,)))(cat(a.flatten(2), b.flatten(2)))
    ),
    "batch": lambda net, a, b: net.layer(cat(a, b, 0)),
    "rows": lambda net, a, b: net.layer(cat(a, b, 2)),
    "a single operand": lambda net, a, b: net.layer(torch.cat([a], 1)),
    "an empty operand": lambda net, a, b: net.layer(torch.cat([torch.empty(0), a], 1)),
    "cut apart again": lambda net, a, b: net.layer(cat(a, b).chunk(2, 1)[0]),
    "labels": lambda net, a, b: net.layer(a) * torch.cat([a.argmax(1), b.argmax(1)]).max(),
    "masks": lambda net, a, b: net.layer(a * cat(a > 0, b > 0).any(1, keepdim=True)),
    "shapes": lambda net, a, b: net.layer(a.view(*torch.cat([torch.tensor(a.shape)]).tolist())),
    "losses": lambda net, a, b: net.layer(a) + torch.stack([a.mean(), b.mean()]).sum(),
    "after the last layer": lambda net, a, b: cat(net.layer(a), net.layer(b)),
    "attention": lambda net, a, b: net.layer(
        F.scaled_dot_product_attention(a, cat(a, b, 2), cat(a, b, 2))
    ),
    "positions": lambda net, a, b: net.layer(a + positions().permute(2, 0, 1)),
    "positions to a layer": lambda net, a, b: net.layer(a) + net.few(positions()).sum(),
    "parameters": lambda net, a, b: net.layer(a) + net.few(cat(net.weight, net.weight, 1)[:, 6:10]),
    "no concatenation": lambda net, a, b: net.layer(a),
}


@pytest.mark.parametrize("case", SILENT)
def test_other_concatenations_are_not_mistaken_for_fusions(case, maps):
    net = Net(SILENT[case], layer=nn.Conv2d(4, 4, 1), linear=nn.Linear(64, 3), few=nn.Linear(4, 8))
    assert refusals(net, maps) == {}
    seen = "no concatenation was seen" if case == "no concatenation" else "seen: (cat|stack)"
    with pytest.raises(NoFusionError, match=seen):
        find_fusions(net, *maps)


def test_the_error_lists_what_was_seen_and_left_alone(maps):
    net = Net(lambda net, a, b: net.fuse(F.gelu(cat(a, b))))
    with pytest.raises(NoFusionError) as caught:
        find_fusions(net, *maps)
    text = str(caught.value)
    assert "seen: cat(dim=1) of (2, 4, 8, 8), (2, 4, 8, 8) in the model" in text
    assert "left alone: fuse: the operation gelu" in text
    assert "Check include/exclude" in text


def test_long_lists_in_the_error_end_where_the_decoder_is(maps):
    def run(net, a, b):
        for _ in range(30):
            cat(a, b, 0)
        return net.fuse(F.gelu(cat(a, b)))

    with pytest.raises(NoFusionError, match="11 more before these") as caught:
        find_fusions(Net(run), *maps)
    assert str(caught.value).count("seen: cat") == 20


def test_patterns_choose_and_say_what_they_leave_out(maps):
    def run(net, a, b):
        return net.fuse(net.encoder(cat(a, b)) + net.decoder(cat(b, a)))

    net = Net(run, encoder=nn.Conv2d(8, 8, 1), decoder=nn.Conv2d(8, 8, 1))
    found = examine(net, lambda: net(*maps), exclude=("enc*",))
    assert [fusion.name for fusion in found.fusions] == ["decoder"]
    assert {r.name for r in found.refusals if "exclude patterns" in r.reason} == {"encoder"}
    names = [fusion.name for fusion in find_fusions(net, *maps, include=("encoder",), exclude=())]
    assert names == ["encoder"]


def test_what_an_encoder_concatenates_is_one_branch(maps):
    class Dense(nn.Module):
        def forward(self, x):
            return torch.cat([x, F.relu(x)], 1)

    def run(net, a, b):
        level = net.encoder(a)
        return net.fuse(cat(level, b)) + net.lateral(level)

    net = Net(run, nn.Conv2d(12, 4, 1), encoder=Dense(), lateral=nn.Conv2d(8, 4, 1))
    (fusion,) = find_fusions(net, *maps)
    assert (fusion.name, [branch.width for branch in fusion.branches]) == ("fuse", [8, 4])
    everything = find_fusions(net, *maps, exclude=())
    assert [(f.name, len(f.branches)) for f in everything] == [("fuse", 3), ("lateral", 2)]
    rows = equalize_(net, [maps], forward=lambda net, pair: net(*pair), exclude=()).rows
    assert len(rows) == 5
