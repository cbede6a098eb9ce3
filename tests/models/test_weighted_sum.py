"""Fast normalized fusion by hand, and what it keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seglab.models.necks.weighted_sum import WeightedSum


@pytest.mark.parametrize("n_inputs", [2, 3, 8])
def test_equal_maps_fuse_to_just_below_themselves(n_inputs: int) -> None:
    fused = WeightedSum(n_inputs)([torch.ones(1, 2, 3, 3)] * n_inputs)
    torch.testing.assert_close(fused, torch.full((1, 2, 3, 3), n_inputs / (n_inputs + 1e-4)))


def test_negative_weight_removes_its_edge_and_gradient() -> None:
    fuse = WeightedSum(3)
    with torch.no_grad():
        fuse.edge_weights[1] = -1
    inputs = [torch.full((1, 1, 2, 2), float(v), requires_grad=True) for v in (1, 50, 3)]
    fused = fuse(inputs)
    torch.testing.assert_close(fused, torch.full((1, 1, 2, 2), 4 / (2 + 1e-4)))
    fused.sum().backward()
    assert not inputs[1].grad.any()
    assert fuse.edge_weights.grad[1] == 0
    assert fuse.edge_weights.grad[0] != 0


def test_only_ratios_of_edge_weights_matter() -> None:
    inputs = [torch.randn(1, 2, 4, 4, dtype=torch.float64) for _ in range(3)]
    fuse = WeightedSum(3, eps=0.0).double()
    before = fuse(inputs)
    with torch.no_grad():
        fuse.edge_weights.mul_(7)
    torch.testing.assert_close(fuse(inputs), before)
    scales = torch.tensor([2.0, 0.5, 4.0])
    with torch.no_grad():
        fuse.edge_weights.fill_(1).div_(scales)
    explicit = sum(x / s for x, s in zip(inputs, scales, strict=True)) / (1 / scales).sum()
    torch.testing.assert_close(fuse(inputs), explicit)


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_weights_before_resizing_equal_weights_after(mode: str) -> None:
    fuse = WeightedSum(2, mode=mode).double()
    nn.init.uniform_(fuse.edge_weights, 0.1, 2)
    fine, coarse = (torch.randn(1, 2, s, s + 1, dtype=torch.float64) for s in (9, 4))
    w = fuse.edge_weights / (fuse.edge_weights.sum() + 1e-4)
    expected = w[0] * fine + w[1] * F.interpolate(coarse, fine.shape[-2:], mode=mode)
    torch.testing.assert_close(fuse([fine, coarse]), expected)


def test_plain_sum_has_no_weights() -> None:
    fuse = WeightedSum(2, learned=False)
    assert list(fuse.parameters()) == []
    assert fuse.normalized_weights() is None
    assert torch.equal(fuse(ones(2)), torch.full((1, 1, 2, 2), 3.0))


def ones(n: int) -> list[Tensor]:
    return [torch.full((1, 1, 2, 2), float(i + 1)) for i in range(n)]


def test_nothing_full_size_is_kept_for_the_backward_pass() -> None:
    fine, *coarse = (torch.randn(1, 4, 64 >> i, 64 >> i, requires_grad=True) for i in range(4))
    kept: list[Tensor] = []
    fuse = WeightedSum(4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fuse([fine, *coarse])
    full = {x.data_ptr() for x in kept if x.numel() >= fine.numel()}
    assert full <= {fine.data_ptr()}


def test_another_number_of_maps_is_refused() -> None:
    with pytest.raises(ValueError, match="adds 3 maps, got 2"):
        WeightedSum(3)(ones(2))
