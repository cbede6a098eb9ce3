"""Less memory in training: what a block computes is computed again in the backward pass.

Either everything in a block is, or only what is cheap (normalizations, activations, sums) while the
results of convolutions are kept. Unlike in `torch.utils.checkpoint` alone, the second computation
finds every buffer and every training flag as the first one did, and leaves them as it found them:
running statistics are updated once, power iterations of a spectral norm are not taken further, and
whatever happens to the network in between (another forward pass, evaluation) does not matter.
Weights that were changed in between are an error, as they are to autograd.

Results of matrix products are not kept: a network that goes on to change them in place (MViT does)
would get wrong gradients, and torch notices that for convolutions only.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from seglab.torch_internals import buffers_of, version

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def recompute_blocks_(model: nn.Module, keep_convolutions: bool) -> None:
    """Let every block of a network be recomputed in the backward pass, in place.

    Blocks are the modules of the class that occurs most often among those that hold more than half
    of the weights, two matrices or more in each, or what these are parts of: residual blocks,
    transformer blocks.

    Args:
        model: of any architecture.
        keep_convolutions: keep the results of convolutions.

    Raises:
        ValueError: no block is found, or convolutions are to be kept and there are other layers.

    >>> from torchvision.models import resnet18
    >>> recompute_blocks_(resnet18(), keep_convolutions=True)
    """
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks to recompute: leave "
            "gradient_checkpointing out"
        )
    unsupported = set().union(*map(_other_layers, blocks)) if keep_convolutions else set()
    if unsupported:
        raise ValueError(
            f"gradient_checkpointing='pointwise' is for blocks of convolutions, but those of "
            f"{type(model).__name__} have weights in {', '.join(sorted(unsupported))}: set it to"
            " true"
        )
    for block in blocks:
        block.forward = partial(_recomputed, block, keep_convolutions)
        if keep_convolutions:
            _keep_results_intact_(block)


def _blocks(model: nn.Module) -> list[nn.Module]:
    by_class: dict[type[nn.Module], list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        n_matrices = sum(p.ndim > 1 for p in module.parameters())
        if n_matrices > 1 and module is not model and not isinstance(module, CONTAINERS):
            by_class[type(module)].append(module)
    repeated = [
        blocks
        for blocks in by_class.values()
        if len(blocks) > 1 and 2 * sum(map(_n_weights, blocks)) > _n_weights(model)
    ]
    parts = max(repeated, key=lambda blocks: (len(blocks), _n_weights(blocks[0])), default=[])
    return _wholes(model, parts)


def _wholes(model: nn.Module, parts: list[nn.Module]) -> list[nn.Module]:
    """Of blocks that are mere parts of larger ones (an MLP beside its attention), the larger."""
    parents = {child: parent for parent in model.modules() for child in parent.children()}

    def is_part(block: nn.Module) -> bool:
        parent = parents[block]
        inside = sum(_n_weights(part) for part in parts if parents[part] is parent)
        is_block = parent is not model and not isinstance(parent, CONTAINERS)
        return is_block and 4 * inside < 3 * _n_weights(parent)

    wholes = [parents[part] if is_part(part) else part for part in parts]
    return list(dict.fromkeys(wholes))


def _other_layers(block: nn.Module) -> set[str]:
    """Classes of layers with a matrix as weight that are no convolutions, parametrized or not."""
    return {
        type(module).__name__
        for module in block.modules()
        if not isinstance(module, (nn.Conv2d, ParametrizationList))
        and any(p.ndim > 1 for p in module.parameters(recurse=False))
    }


def _n_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _keep_results_intact_(block: nn.Module) -> None:
    """An activation in place would overwrite the convolution's result that is kept."""
    for module in block.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]


def _recomputed(block: nn.Module, keep_convolutions: bool, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled() or not block.training:
        return forward(*args, **kwargs)
    contexts = partial(_contexts, block, keep_convolutions)
    # A caller may go on to lengthen the list it gave (DenseNet does).
    args = tuple(list(value) if isinstance(value, list) else value for value in args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(block: nn.Module, keep_convolutions: bool) -> Contexts:
    """What the first and the second computation run in."""
    state = _State(block)  # as the first computation finds it
    if not keep_convolutions:
        return nullcontext(), _Again(state, nullcontext())
    first, second = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return first, _Again(state, second)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operator is torch.ops.aten.convolution.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class _State:
    """Buffers and training flags of a block, and which weights it had."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.modules = [(m, m.training, _copies(buffers_of(m))) for m in block.modules()]
        self.versions = [(p, version(p)) for p in block.parameters()]

    def check_weights(self) -> None:
        """Raise as autograd does when what it saved was changed."""
        if any(version(p) != found for p, found in self.versions):
            raise RuntimeError(
                f"a weight of {type(self.block).__name__} was changed in place between its forward"
                " and backward pass, so gradient_checkpointing cannot compute it again: step the"
                " optimizer after the backward pass, or set gradient_checkpointing to false"
            )


def _copies(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: x if x is None else x.detach().clone() for name, x in buffers.items()}


class _Again:
    """The second computation, on copies of the state that the first one found.

    May be entered again, by a second backward pass through the same graph.
    """

    def __init__(self, state: _State, kept: AbstractContextManager[Any]) -> None:
        self.state = state
        self.kept = kept

    def __enter__(self) -> None:
        self.state.check_weights()
        self.originals = [(m, m.training, dict(buffers_of(m))) for m, _, _ in self.state.modules]
        for module, training, buffers in self.state.modules:
            module.training = training
            buffers_of(module).update(_copies(buffers))
        self.kept.__enter__()

    def __exit__(self, *exception: Any) -> None:
        try:
            self.kept.__exit__(*exception)
        finally:
            for module, training, buffers in self.originals:
                module.training = training
                buffers_of(module).update(buffers)
