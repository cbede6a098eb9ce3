"""Random networks are equal to the explicit form or refused; none is wrong in silence.

Two oracles, both independent of the package (`explicit_oracle`): hooks that divide what every
reported consumer takes, and factors on the parts of every concatenation that show which channels
follow which part. Float64; outputs agree to 1e-10, stds to 1e-7 with numpy.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from behaviour_oracle import Behaviour
from explicit_oracle import attempt, check, check_joins, folded, mentions, said
from random_networks import batches, random_network
from scale_equalization import ScaleEqualizationError, find_fusions
from scale_equalization.patterns import DEFAULT_EXCLUDE
from torch import Tensor
from torch.nn import Module

QUICK, ALL = 40, 300
SEEDS = [pytest.param(n, marks=pytest.mark.slow) if n >= QUICK else n for n in range(ALL)]


def legal(network, data) -> set[str]:
    """Consumers whose every channel follows one part, whose weight has no other use or owner."""
    behaviour = Behaviour(network, data)
    layers = {name: network.get_submodule(name) for name in behaviour.fusing}
    return {
        name
        for name, layer in layers.items()
        if behaviour.pure(name)
        and behaviour.calls[name] == 1
        and isinstance(layer._parameters.get("weight"), torch.nn.Parameter)
        and not behaviour.used_elsewhere(name, data[0])
    }


@dataclass
class Outcome:
    """One network, before and after, and what its oracle says of the consumers."""

    before: Module
    after: Module
    data: list[Tensor]
    report: Any

    @property
    def took(self) -> set[str]:
        return folded(self.report)

    @property
    def missed(self) -> set[str]:
        """Plain fusions that were not folded."""
        return self.before.simple - self.took

    @property
    def silent(self) -> set[str]:
        """Layers that take something of a concatenation, and of which nothing is said."""
        if self.report is None:
            return set()
        fusing = Behaviour(self.before, self.data).fusing
        return {name for name in fusing - self.took if not mentions(self.report, name)}


@cache
def outcome(seed: int) -> Outcome:
    """Equalized; if that is refused with a cure, the cure is taken."""
    network, data = random_network(seed), batches(seed)
    before, left_out = copy.deepcopy(network), list(DEFAULT_EXCLUDE)
    report, error = attempt(network, data)
    while report is None and (cure := re.search(r"exclude=\('(.+?)', \.\.\.\)", str(error))):
        assert cure[1] not in left_out, "the cure does not help"
        left_out.append(cure[1])
        report, error = attempt(network, data, exclude=left_out)
    return Outcome(before, network, data, report)


@cache
def joins_checked(seed: int) -> int:
    """How many folded layers equal the network whose parts are divided where they are joined."""
    result, new = outcome(seed), batches(seed + 5000, 2)
    if result.report is None:
        return 0
    return check_joins(result.before, result.after, result.report, result.data, new)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_network_is_equal_or_refused(seed):
    result = outcome(seed)
    if result.report is not None:
        print(result.before.program)
        check(result.before, result.after, result.report, result.data)


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_divided_where_joined_give_the_changed_layers(seed):
    result = outcome(seed)
    print(result.before.program)
    joins_checked(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_simple_fusions_of_random_networks_are_folded(seed):
    result = outcome(seed)
    assert not result.missed, f"{result.before.program}\n{said(result.report)}"


@pytest.mark.parametrize("seed", SEEDS)
def test_no_consumer_of_random_network_is_passed_over(seed):
    result = outcome(seed)
    assert not result.silent, f"{result.before.program}\n{said(result.report)}"


@pytest.mark.parametrize(
    "number", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"]
)
def test_most_legal_fusions_of_random_networks_are_folded(number, capsys):
    total = Counter()
    for seed in range(number):
        result = outcome(seed)
        allowed = legal(result.before, result.data)
        total["networks"] += 1
        total["refused networks"] += result.report is None
        total["legal"] += len(allowed)
        total["legal but refused"] += len(allowed - result.took)
        total["folded"] += len(result.took)
        total["compared with divided parts"] += joins_checked(seed)
        total["simple"] += len(result.before.simple)
    with capsys.disabled():
        print(f"\nrandom networks: {dict(total)}")
    assert total["simple"] >= number // 2
    assert total["legal but refused"] < 0.2 * total["legal"]
    assert total["compared with divided parts"] > 0.9 * total["folded"]


def test_generator_repeats_itself():
    first, second = random_network(3), random_network(3)
    assert first.program == second.program
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize("seed", range(QUICK))
def test_finding_leaves_random_network_as_it_was(seed):
    network = random_network(seed)
    before, state = copy.deepcopy(network), torch.get_rng_state()
    with contextlib.suppress(ScaleEqualizationError):
        find_fusions(network, batches(seed, 1)[0])
    assert torch.equal(state, torch.get_rng_state())
    left, right = network.state_dict(), before.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
