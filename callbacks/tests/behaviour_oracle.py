"""How linear layers follow the parts of concatenations, by multiplying the parts.

Independent of the package: forward hooks, and factors that are no powers of two.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter, defaultdict

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

# A stack is a concatenation along a new dimension: once that is flattened into the channels, each
# operand is channels of its own. Without it two maps that are stacked would count as the one that
# both were made from, and dividing them by two stds as wrong.
CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate, torch.stack}
FACTORS = (0.37, 5.3)  # positive, and no power of two


def channel_axis(module, x) -> int:
    """The axis of the input channels of a convolution or linear layer."""
    return x.dim() - 1 if isinstance(module, nn.Linear) else x.dim() - len(module.kernel_size) - 1


def calibrating(network):
    """The network in training mode with dropout off: the mode it is measured in."""
    network.train()
    for module in network.modules():
        if "Dropout" in type(module).__name__:
            module.eval()
    return network


def run(network, batch, forward=None):
    """The output for the same random draws every time, flattened to a list of tensors."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = network(batch) if forward is None else forward(network, batch)
    return [result] if isinstance(result, torch.Tensor) else list(result)


class Scaled(TorchFunctionMode):
    """Multiplies parts of concatenations; counts concatenations and their parts.

    `factors` are by (number of the concatenation, number of its part).
    """

    def __init__(self, factors=None) -> None:
        super().__init__()
        self.factors = factors or {}
        self.parts: list[int] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function not in CONCATENATIONS:
            return function(*args, **kwargs)
        tensors = list(args[0] if args else kwargs.pop("tensors"))
        call = len(self.parts)
        self.parts.append(len(tensors))
        for part in range(len(tensors)):
            if (call, part) in self.factors:
                tensors[part] = tensors[part] * self.factors[call, part]
        return function(tensors, *args[1:], **kwargs)


def taken(network, batch, mode, pinned=None, forward=None):
    """Inputs and outputs of every linear layer by (name, call); outputs are `pinned` if given."""
    inputs, outputs, handles = {}, {}, []
    calls: dict[str, int] = defaultdict(int)

    def record(name, args, output):
        key = (name, calls[name])
        calls[name] += 1
        inputs[key] = args[0].detach().clone()
        outputs[key] = output if pinned is None else pinned[key]
        return outputs[key]

    for name, module in network.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            hook = lambda m, a, o, name=name: record(name, a, o)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    try:
        with mode:
            result = run(network, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, outputs, result


class Behaviour:
    """How the input of every linear layer follows the parts of every concatenation.

    For each call of a layer and each part: channels that are multiplied as the part is, and
    channels that stay. All outputs of linear layers are held at those of the unchanged run.
    """

    def __init__(self, network, batches, forward=None) -> None:
        self.network = calibrating(copy.deepcopy(network))
        self.forward = forward
        self.scaled: dict[tuple, dict[tuple, np.ndarray]] = defaultdict(dict)
        self.same: dict[tuple, dict[tuple, np.ndarray]] = defaultdict(dict)
        self.blank: dict[tuple, np.ndarray] = {}
        self.touched: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self.calls: dict[str, int] = defaultdict(int)
        for number, batch in enumerate(batches):
            for factor in FACTORS if len(batches) == 1 else (FACTORS[number % 2],):
                self._probe(number, batch, factor)

    def _probe(self, number, batch, factor) -> None:
        counting = Scaled()
        reference, pinned, _ = taken(self.network, batch, counting, None, self.forward)
        for name, call in reference:
            self.calls[name] = max(self.calls[name], call + 1)
        for call, parts in enumerate(counting.parts):
            for part in range(parts):
                mode = Scaled({(call, part): factor})
                inputs, _, _ = taken(self.network, batch, mode, pinned, self.forward)
                for key, x in inputs.items():
                    self._compare(key, (call, part), reference[key], x, factor, number)

    def _compare(self, key, label, before, after, factor, number) -> None:
        axis = channel_axis(self.network.get_submodule(key[0]), before)
        before, after = (x.movedim(axis, 0).flatten(1).double() for x in (before, after))
        scale = before.abs().max()
        near = [(after - k * before).abs().amax(1) <= 1e-11 * scale * k for k in (factor, 1.0)]
        key = (*key, number)
        self.blank[key] = (before.abs().amax(1) == 0).numpy()
        for store, now in zip((self.scaled, self.same), near, strict=True):
            old = store[key].get(label)
            store[key][label] = now.numpy() if old is None else old & now.numpy()
        if ((after - before).abs().amax() > 1e-3 * scale).item():
            self.touched[key[0]].add(label)

    @property
    def fusing(self) -> set[str]:
        """The layers that take something of two parts of one concatenation."""
        return {
            name
            for name, labels in self.touched.items()
            if max(Counter(call for call, _ in labels).values()) > 1
        }

    def follows(self, name: str, start: int, stop: int) -> bool:
        """Whether, at every call, one part alone decides the scale of the channels.

        A call on which all of them are zero is left out: zero times any factor is zero, so the
        explicit network and the folded one agree on it whatever the factor. If no call is left,
        nothing decides the slice, and it is no branch.
        """
        keys = [key for key in self.scaled if key[0] == name]
        keys = [key for key in keys if not self.blank[key][start:stop].all()]
        return bool(keys) and all(
            any(
                scaled[start:stop].all() and not self.same[key][label][start:stop].all()
                for label, scaled in self.scaled[key].items()
            )
            for key in keys
        )

    def labels(self, name: str, start: int, stop: int) -> frozenset:
        """The parts that decide the scale of all these channels, at any call."""
        return frozenset(label for _, label in self.origin(name, start, stop))

    def origin(self, name: str, start: int, stop: int) -> frozenset:
        """The same with the call: a layer that is called twice may take its branches in turn."""
        return frozenset(
            (key[1], label)
            for key in self.scaled
            if key[0] == name
            for label, scaled in self.scaled[key].items()
            if scaled[start:stop].all() and not self.same[key][label][start:stop].all()
        )

    def is_blank(self, name: str, start: int, stop: int) -> bool:
        """Whether the channels are zero wherever the layer is called."""
        return all(self.blank[key][start:stop].all() for key in self.scaled if key[0] == name)

    def follows_alone(self, name: str, label) -> bool:
        """Whether every channel of a layer is multiplied as this part is, or stays."""
        keys = [key for key in self.scaled if key[0] == name]
        return all((self.scaled[key][label] | self.same[key][label]).all() for key in keys)

    def pure(self, name: str) -> bool:
        """Whether every channel is multiplied as some part is or stays, for every part.

        Or for every part of one concatenation that decides the channel. What lies before that one,
        a nonlinearity behind an earlier concatenation, happens inside its parts: the explicit
        network divides them at the last point where they are joined, and leaves what made them as
        it is. A nonlinearity behind it spoils its own parts, and is seen there.
        """
        return all(self._pure_channels(key).all() for key in self.scaled if key[0] == name)

    def _pure_channels(self, key) -> np.ndarray:
        scaled, same = self.scaled[key], self.same[key]
        pure = np.all([scaled[label] | same[label] for label in scaled], axis=0)
        for call in {call for call, _ in scaled}:
            parts = [label for label in scaled if label[0] == call]
            fits = np.all([scaled[label] | same[label] for label in parts], axis=0)
            pure |= fits & np.any([scaled[label] & ~same[label] for label in parts], axis=0)
        return pure

    def used_elsewhere(self, name: str, batch) -> bool:
        """Whether the layer's weight matters when all linear layers give held outputs."""
        network = copy.deepcopy(self.network)
        weight = network.get_submodule(name).weight
        before = taken(network, batch, contextlib.nullcontext(), None, self.forward)
        with torch.no_grad():
            weight.mul_(torch.rand_like(weight) + 0.25)
        after = taken(network, batch, contextlib.nullcontext(), before[1], self.forward)
        pairs = [(before[0][k], after[0][k]) for k in before[0]]
        pairs += list(zip(before[2], after[2], strict=True))
        return not all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in pairs)
