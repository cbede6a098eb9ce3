"""Measured scales against plain hooks on torch.cat, and what measuring leaves behind."""

from __future__ import annotations

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
from scale_equalization import (
    NoFusionError,
    ScaleEqualizationError,
    equalize_,
    find_fusions,
    measure_scales,
)
from scale_equalization.measuring import Measurement
from scale_equalization.options import Options
from torch import nn


class CatRecorder:
    """Collects the operands of every torch.cat call: knows nothing of the package."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operands: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.call = 0
        plain = torch.cat

        def cat(tensors, dim=0):
            for index, tensor in enumerate(tensors):
                self.operands.setdefault((self.call, index), []).append(tensor.detach().double())
            self.call += 1
            return plain(tensors, dim=dim)

        monkeypatch.setattr(torch, "cat", cat)

    def std(self, call: int, index: int) -> float:
        values = torch.stack(self.operands[call, index])
        return values.std(correction=0).item()


@pytest.fixture
def record(monkeypatch):
    def run(network, batches):
        with monkeypatch.context() as patch:
            recorder = CatRecorder(patch)
            network.train()
            with torch.no_grad():
                for batch in batches:
                    recorder.call = 0
                    network(batch)
        return recorder

    return run


def test_scales_equal_plain_hooks_on_cat(make_network, batches, record):
    network = make_network()
    report = measure_scales(network, batches, tolerance=0)
    recorder = record(copy.deepcopy(network), batches)
    for index in (0, 1):
        row = report.rows[index]
        assert row["fusion"] == "inner"
        assert row["std"] == pytest.approx(recorder.std(0, index), rel=1e-6)
        assert row["scale"] == pytest.approx(1 / recorder.std(0, index), rel=1e-6)


def test_every_level_is_at_equilibrium_after_one_call(make_network, batches, record):
    network = make_network()
    report = equalize_(network, batches, tolerance=0)
    recorder = record(network, batches)
    for row in report.rows:
        call = {"inner": 0, "outer": 1}[row["fusion"]]
        assert recorder.std(call, row["branch"]) * row["scale"] == pytest.approx(1, abs=2e-3)


def test_first_batch_that_misleads_is_corrected(make_network, batches, record):
    torch.manual_seed(3)
    odd = torch.randn(4, 3, 16, 16) * 20 + 7
    network = make_network()
    network.inner_bn = nn.Identity()
    report = equalize_(network, [odd, *batches], tolerance=0)
    recorder = record(network, [odd, *batches])
    for row in report.rows:
        call = {"inner": 0, "outer": 1}[row["fusion"]]
        assert recorder.std(call, row["branch"]) * row["scale"] == pytest.approx(1, abs=0.01)


def test_order_of_batches_does_not_matter_for_separate_fusions(make_network, batches):
    forwards = measure_scales(make_network(), batches, tolerance=0, include=("inner",))
    backwards = measure_scales(make_network(), batches[::-1], tolerance=0, include=("inner",))
    for a, b in zip(forwards.rows, backwards.rows, strict=True):
        assert a["std"] == pytest.approx(b["std"], rel=1e-12)


def test_measuring_stops_when_the_scales_are_known(make_network):
    torch.manual_seed(0)
    stream = (torch.randn(8, 3, 16, 16) for _ in range(10_000))
    report = measure_scales(make_network(), stream, tolerance=0.02)
    assert report.batches < 100
    assert all(0 < row["precision"] <= 0.02 for row in report.rows)


def test_max_batches_bounds_the_work(make_network, batches):
    seen = []
    measure_scales(
        make_network(),
        batches,
        tolerance=0,
        max_batches=5,
        progress=seen.append,
        include=("inner",),
    )
    assert seen == [1, 2, 3, 4, 5]


def test_measuring_leaves_no_trace(make_network, batches):
    network = make_network()
    network.eval()
    network.inner_bn.train()
    network.append = None
    network.register_forward_hook(lambda *_: None)
    flags = {name: module.training for name, module in network.named_modules()}
    hooks = len(network._forward_hooks)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    rng = torch.get_rng_state(), random.getstate()
    measure_scales(network, batches)
    assert {name: module.training for name, module in network.named_modules()} == flags
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert len(network._forward_hooks) == hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_an_exception_leaves_no_trace_either(make_network, batches):
    network = make_network().eval()
    counter = network.inner_bn.num_batches_tracked.clone()
    with pytest.raises(RuntimeError, match="channels"):
        measure_scales(network, [batches[0], torch.zeros(1, 4, 8, 8)])
    assert not any(module.training for module in network.modules())
    assert torch.equal(network.inner_bn.num_batches_tracked, counter)
    assert torch.is_grad_enabled()
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_frozen_layers_are_measured_as_they_will_be_trained(make_network, batches):
    network = make_network()
    network.inner_bn.running_var.fill_(0.01)
    network.inner_bn.eval().requires_grad_(False)
    row = measure_scales(network, batches, tolerance=0, include=("outer",)).rows[1]
    seen = []
    network.outer.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 6:]))
    with torch.no_grad():
        for batch in batches:
            network(batch)  # in train mode but for the frozen layer
    assert row["std"] == pytest.approx(torch.stack(seen).std(correction=0).item(), rel=1e-5)


def test_network_in_eval_mode_is_measured_as_in_training(make_network, batches):
    usual = measure_scales(make_network(), batches).rows
    assert measure_scales(make_network().eval(), batches).rows == usual


def test_dropout_is_off_while_measuring(make_network, batches):
    network = make_network()
    plain = measure_scales(network, batches, tolerance=0).rows
    network.fine = nn.Sequential(network.fine, nn.Dropout2d(0.9))
    dropped = measure_scales(network, batches, tolerance=0).rows
    assert [row["std"] for row in plain] == [row["std"] for row in dropped]


def test_constant_branch_is_left_as_it_is(batches):
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.fuse(torch.cat([x, torch.full_like(x, 0.3)], dim=1))

    report = equalize_(Constant(), batches)
    assert report.rows[1]["scale"] == 1.0
    assert "constant" in report.rows[1]["note"]
    assert report.rows[0]["scale"] != 1.0


class Pooled(nn.Module):
    """A branch pooled to 1x1 and normalized: with batch size 1, PyTorch refuses to train it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 256, 1, bias=False), nn.BatchNorm2d(256)
        )
        self.fuse = nn.Conv2d(259, 2, 1)

    def forward(self, x):
        pooled = self.pool(x).relu().expand(-1, -1, *x.shape[2:])
        return self.fuse(torch.cat([x, pooled], dim=1))


def test_one_pooled_sample_is_measured_and_said(batches):
    network = Pooled()
    report = measure_scales(network, [batch[:1] for batch in batches])
    many = measure_scales(network, [torch.cat(batches) + torch.randn(48, 3, 1, 1)])
    assert "one value per channel" in report.notes[0]
    assert report.rows[1]["std"] == pytest.approx(many.rows[1]["std"], rel=0.15)


def test_float16_overflow_is_named():
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            big = (x.half() * 60000).float()
            return self.fuse(torch.cat([x, big], dim=1))

    with pytest.raises(ScaleEqualizationError, match=r"branch 1 of fuse is not finite.*float16"):
        measure_scales(Overflow(), [torch.randn(4, 3, 8, 8) * 10])


def test_no_batch_is_an_error(make_network):
    with pytest.raises(ScaleEqualizationError, match="batches are empty"):
        measure_scales(make_network(), [])


def test_batch_of_unknown_form_names_the_cure(make_network):
    with pytest.raises(ScaleEqualizationError, match=r"keys \['picture'\].*batch_to_input"):
        measure_scales(make_network(), [{"picture": torch.zeros(1, 3, 8, 8)}])


@pytest.mark.parametrize("key", ["image", "images", "pixel_values", "input", "x"])
def test_input_is_found_in_mappings_and_sequences(make_network, batches, key):
    expected = measure_scales(make_network(), batches).rows
    wrapped = [({key: batch}, torch.zeros(4)) for batch in batches]
    assert measure_scales(make_network(), wrapped).rows == expected


def test_changing_concatenation_is_named(batches):
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fuse = nn.Conv2d(6, 2, 1)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            parts = [x, x] if self.calls < 3 else [x[:, :2], x, x[:, :1]]
            return self.fuse(torch.cat(parts, dim=1))

    with pytest.raises(ScaleEqualizationError, match=r"fuse was called on an input.*exclude"):
        measure_scales(Moody(), batches)


def test_given_fusions_are_measured_as_given(make_network, batches):
    network = make_network()
    fusions = find_fusions(network, batches[0], include=("outer",))
    report = measure_scales(network, batches, fusions)
    assert {row["fusion"] for row in report.rows} == {"outer"}


def test_network_without_fusion_says_what_was_seen(batches):
    with pytest.raises(NoFusionError, match="no concatenation was seen"):
        measure_scales(nn.Conv2d(3, 2, 1), batches)


@pytest.mark.parametrize(("norm", "change", "restarts"), [
    ("bn", 0.04, False), ("bn", 0.06, True), ("", 0.004, False), ("", 0.006, True),
])  # fmt: skip
def test_wrong_provisional_scale_counts_more_without_a_norm_behind_it(norm, change, restarts):
    inner = SimpleNamespace(name="inner", upstream=(), norm=norm)
    outer = SimpleNamespace(name="outer", upstream=("inner",), norm="")
    plan = SimpleNamespace(fusions=(inner, outer), sums=())
    measurement = Measurement(nn.Identity(), plan, Options(tolerance=0.01))
    found = {"inner": (math.exp(change),), "outer": (9.0,)}
    assert measurement._drifted({"inner": (1.0,), "outer": (1.0,)}, found) == ["inner"] * restarts


def test_no_batches_leave_no_row_that_would_count_as_an_observation():
    plan = SimpleNamespace(fusions=(SimpleNamespace(branches=(0, 1)),), sums=())
    table = Measurement(nn.Identity(), plan, Options())._round(iter(()), {})
    assert table.shape == (0, 2, 3)


class Ladder(nn.Module):
    """Six fusions behind one another and nothing normalized: an error on one level stays."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.skips = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(6))
        self.fuse = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(6))

    def forward(self, x):
        y = 7 * self.stem(x)
        for i, (skip, fuse) in enumerate(zip(self.skips, self.fuse, strict=True)):
            y = torch.nn.functional.silu(fuse(torch.cat([y, 3 ** (i % 3 - 1) * skip(x)], 1)))
        return y


class Noisy(torch.utils.data.Dataset):
    """Samples of unequal scale, drawn anew at each reading."""

    def __len__(self):
        return 256

    def __getitem__(self, index):
        return torch.randn(3, 16, 16) * (1 + 0.4 * torch.rand(()))


@pytest.mark.parametrize("drawn_anew", [False, True])
def test_every_level_of_a_long_chain_settles(drawn_anew):
    torch.manual_seed(0)
    network = Ladder()
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=4)
    batches = loader if drawn_anew else list(loader)
    report = equalize_(network, batches)
    assert not [note for note in report.notes if "settle" in note]
    taken = {f"fuse.{i}": [] for i in range(6)}
    for name, values in taken.items():
        hook = lambda module, args, values=values: values.append(args[0].double())  # noqa: E731
        network.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for row in report.rows:
        x = torch.cat(taken[row["fusion"]])[:, row["start"] : row["stop"]]
        assert float(x.std()) * row["scale"] == pytest.approx(1, abs=0.02 if drawn_anew else 0.01)
