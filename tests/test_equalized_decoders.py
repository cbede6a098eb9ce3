"""Scale equalization of the two further decoders; the oracles resize, add and divide themselves."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from scale_equalization import Report, ScaleEqualizationCallback, equalize_
from torch import Tensor, nn
from torch.utils.data import DataLoader

from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import BiFPNHead, RSPHead
from seglab.models.necks import BiFPN
from seglab.models.necks.weighted_sum import WeightedSum

CHANNELS = (4, 6, 8, 10)
ESEG = partial(BiFPNHead, channels=8, repeats=2, levels=(2, 9), head_repeats=1, dropout=0.0)
RSP = partial(RSPHead, channels=16, key_channels=8, attention_heads=4, dropout=0.0)


def features(height: int = 96, width: int = 160, batch: int = 3) -> list[Tensor]:
    """Encoder features of unlike scale, in float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in (2, 3, 4, 5)]
    return [
        gain * torch.randn(batch, c, *size, generator=generator, dtype=torch.float64)
        for gain, c, size in zip((1, 0.2, 3, 0.5), CHANNELS, sizes, strict=True)
    ]


def equalize(head: nn.Module, batch: list[Tensor], **options: Any) -> Report:
    return equalize_(head, [batch], forward=lambda m, x: m(x), tolerance=0, **options)


def summand_stds(head: nn.Module, batch: list[Tensor]) -> dict[str, list[float]]:
    """For each weighted sum with edge weights, the std of what it adds up."""
    found: dict[str, list[float]] = {}
    handles = []
    for name, module in head.named_modules():
        if isinstance(module, WeightedSum) and module.edge_weights is not None:

            def look(fuse: nn.Module, args: Any, name: str = name) -> None:
                mode = "bilinear" if name == "merge" else "nearest"
                size = args[1] if len(args) > 1 else args[0][0].shape[-2:]
                maps = [
                    x if x.shape[-2:] == size else F.interpolate(x, size, mode=mode)
                    for x in args[0]
                ]
                w = fuse.edge_weights.relu() / (fuse.edge_weights.relu().sum() + 1e-4)
                found[name] = [float(a * x.std(correction=0)) for a, x in zip(w, maps, strict=True)]

            handles.append(module.register_forward_pre_hook(look))
    with torch.no_grad():
        head.train()(batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("height", "width"), [(96, 160), (100, 76)])
def test_edges_of_every_node_end_at_one_std(height: int, width: int) -> None:
    torch.manual_seed(0)
    head, batch = ESEG(CHANNELS, 5).double(), features(height, width)
    before = summand_stds(head, batch)
    report = equalize(head, batch, sums=True)
    assert len(before) == len(report.sums) == 2 * 14 + 1  # 2 (L - 1) nodes in a cell, the merge
    ratios = [max(stds) / min(stds) for stds in before.values()]
    assert max(ratios) > 1.5  # max-pooling, or a level resized bilinearly
    for name, stds in summand_stds(head, batch).items():
        assert stds == pytest.approx([stds[0]] * len(stds), rel=1e-9), name


def test_folded_bifpn_computes_the_explicit_one() -> None:
    """The oracle multiplies the maps that go into each sum by c / s_i and keeps the weights."""
    torch.manual_seed(0)
    head, batch = ESEG(CHANNELS, 5).double(), features()
    explicit = copy.deepcopy(head)
    report = equalize(head, batch, sums=True)
    for measure in report.sums:
        stds = torch.tensor([summand.std for summand in measure.summands], dtype=torch.float64)
        factors = len(stds) / (1 / stds).sum() / stds

        def scale(_: nn.Module, args: Any, factors: Tensor = factors) -> Any:
            return ([a * x for a, x in zip(factors, args[0], strict=True)], *args[1:])

        explicit.get_submodule(measure.name).register_forward_pre_hook(scale)
    for mode in (True, False):
        ours, theirs = head.train(mode)(batch), explicit.train(mode)(batch)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    other = features(92, 148)
    torch.testing.assert_close(head(other), explicit(other), rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"kernel_size": 1}, {"window": 5}])
def test_folded_propagators_divide_lateral_and_context(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    head, batch = RSP(CHANNELS, 5, **options).double(), features()
    explicit = copy.deepcopy(head)
    report = equalize(head, batch)
    assert len(report.fusions) == 3
    ratios = []

    def divide(_: nn.Module, args: tuple[list[Tensor]]) -> list[Tensor]:
        stds = [x.detach().std(correction=0) for x in args[0]]
        ratios.append((stds[0] / stds[1]).item())
        return [x / s for x, s in zip(args[0], stds, strict=True)]

    for propagator in explicit.propagators:
        propagator.fuse.register_forward_pre_hook(divide)
    ours, theirs = head.train()(batch), explicit.train()(batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert max(max(r, 1 / r) for r in ratios) > 1.5  # it was worth it


def test_autocast_folds_what_float64_folds() -> None:
    torch.manual_seed(0)
    head, batch = ESEG(CHANNELS, 5), [x.float() for x in features(batch=4)]
    exact = copy.deepcopy(head).double()

    def in_bfloat16(module: nn.Module, maps: list[Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(maps)

    report = equalize_(head, [batch], forward=in_bfloat16, tolerance=0, sums=True)
    assert all(measure.weights for measure in report.sums)
    equalize(exact, [x.double() for x in batch], sums=True)
    for found, wanted in zip(head.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=1e-6)


class Task(LightningModule):
    """Trains a network on noise for a step."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self(batch).square().mean()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(list(torch.rand(6, 3, 68, 100).mul(255)), batch_size=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


PYRAMID = partial(BiFPN, repeats=1, levels=(2, 7))


@pytest.mark.parametrize(
    ("head", "n_fusions", "n_edges", "n_sums"),
    [
        (ESEG, 0, 29, 29),
        (partial(ESEG, merge="nearest"), 0, 29, 29),
        (partial(ESEG, merge="concat"), 1, 28, 28),
        (partial(ESEG, merge="finest"), 0, 14 + 7, 14 + 7),
        # Plain sums are taken as pairs: 7 of two maps, then 6 of three and 1 of two, in two cells;
        # of those behind the first cell some add maps that stem from the same levels.
        (partial(ESEG, weighted=False), 0, 1, 27),
        (RSP, 3, 0, 3),  # FPN adds three times
        # The lateral has the coarser levels in it already: that counts as a residual connection.
        (partial(RSP, fusion="sum"), 0, 0, 3),
        (partial(RSP, pyramid=PYRAMID), 5, 10, 10),
    ],
    ids=["eseg", "nearest", "concat", "finest", "lite", "rsp", "rsp-sum", "rsp-bifpn"],
)
def test_callback_folds_and_proves_every_form(
    head: Any, n_fusions: int, n_edges: int, n_sums: int, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    network = Segmenter(TimmEncoder("test_resnet"), head, num_classes=5)
    callback = ScaleEqualizationCallback(sums=True, verbose=False)
    trainer = Trainer(
        default_root_dir=tmp_path, max_steps=1, accelerator="cpu", callbacks=[callback],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Task(network))
    report = callback.report
    assert report is not None
    weighted = [measure for measure in report.sums if measure.weights]
    assert (len(report.fusions), len(weighted), len(report.sums)) == (n_fusions, n_edges, n_sums)
    assert not any(refusal.name.endswith("edge_weights") for refusal in report.refusals)
    for measure in weighted:
        fuse = network.get_submodule(measure.name.removeprefix("network."))
        wanted = torch.tensor([s.scale for s in measure.summands])
        torch.testing.assert_close(fuse.edge_weights.detach(), wanted)
        assert float(wanted.sum()) == pytest.approx(len(wanted))
