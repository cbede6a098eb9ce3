"""Parameter groups of fine-tuning: a slower encoder, or a rate for every layer of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from seglab.optim import Group, group_by, no_decay_if

ENCODERS = ("encoder.", "model.encoder.")  # of our networks, and of smp's


class EncoderRate:
    """The encoder learns at a multiple of the learning rate; everything else at the rate itself.

    Args:
        factor: of the encoder's rate, such as 0.1.
        no_decay: parts of names whose parameters have no weight decay, such as `norm`.

    Raises:
        ValueError: at the call, for a network without an encoder, or a part that no name contains.

    >>> from seglab.models import TimmEncoder
    >>> network = nn.ModuleDict({"encoder": TimmEncoder("test_resnet"), "head": nn.Linear(2, 2)})
    >>> [(group["name"], group["lr"]) for group in EncoderRate(0.1)(network, 1.0, 0.0)]
    [('encoder_decay', 0.1), ('rest_decay', 1.0)]
    """

    def __init__(self, factor: float = 0.1, no_decay: Sequence[str] = ()) -> None:
        self.factor = factor
        self.no_decay = tuple(no_decay)

    def __call__(self, module: nn.Module, base_lr: float, base_weight_decay: float) -> list[Group]:
        """Return one group for encoder and rest, with and without decay."""
        names = [name for name, _ in module.named_parameters()]
        _refuse_without_encoder(names, "EncoderRate")
        for part in self.no_decay:
            if not any(part in name for name in names):
                raise ValueError(f"no parameter's name contains {part!r}; names: {names[:3]}")
        return group_by(
            module,
            lambda name, _: (
                f"{'encoder' if name.startswith(ENCODERS) else 'rest'}_"
                f"{no_decay_if(any(part in name for part in self.no_decay))}"
            ),
            base_lr,
            base_weight_decay,
            lambda group: self.factor if group.startswith("encoder") else 1.0,
        )


class LayerDecay:
    """Every layer of a timm encoder learns more slowly than the one after it (ELECTRA, BEiT).

    Layer l of L, counted by timm from the image (0 is the stem), learns at base * rate ** (L - l);
    heads, and norms on the encoder's outputs, at the base rate. Vectors, biases and what timm names
    in `no_weight_decay` (position embeddings) have no weight decay.

    Args:
        rate: ratio between neighbouring layers, such as 0.8.

    Raises:
        ValueError: at the call, for an encoder whose layers timm does not number.

    >>> from seglab.models import TimmEncoder
    >>> network = nn.ModuleDict({"encoder": TimmEncoder("resnet18"), "head": nn.Linear(2, 2)})
    >>> groups = LayerDecay(0.5)(network, 1.0, 0.01)
    >>> sorted({group["lr"] for group in groups}, reverse=True)[:3]
    [1.0, 0.5, 0.25]
    """

    def __init__(self, rate: float = 0.8) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"LayerDecay's rate is a factor in (0, 1], got {rate}")
        self.rate = rate

    def __call__(self, module: nn.Module, base_lr: float, base_weight_decay: float) -> list[Group]:
        """Return one group for each layer, with and without decay."""
        layers, undecayed = _number_layers(module)
        n_layers = 1 + max(layers.values())

        def name_group(name: str, parameter: nn.Parameter) -> str:
            bare = parameter.ndim <= 1 or name.endswith(".bias") or name in undecayed
            return f"{layers.get(name, n_layers)}_{no_decay_if(bare)}"

        def scale(group: str) -> float:
            return float(self.rate ** (n_layers - int(group.partition("_")[0])))

        return group_by(module, name_group, base_lr, base_weight_decay, scale)


def _number_layers(module: nn.Module) -> tuple[dict[str, int], set[str]]:
    """Layer of every parameter of the encoder, and those that shall not decay, by full names."""
    from timm.models import group_parameters

    names = [name for name, _ in module.named_parameters()]
    _refuse_without_encoder(names, "LayerDecay")
    model: Any = getattr(getattr(module, "encoder", None), "model", None)
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            f"LayerDecay needs an encoder whose layers timm numbers, not {type(model).__name__}; "
            "EncoderRate slows any encoder down as a whole"
        )
    numbers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    undecayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    prefix = "encoder.model."
    return {prefix + name: int(n) for name, n in numbers.items()}, {prefix + n for n in undecayed}


def _refuse_without_encoder(names: Sequence[str], who: str) -> None:
    if not any(name.startswith(ENCODERS) for name in names):
        raise ValueError(
            f"{who} is for networks with an encoder (parameters `encoder.*`); this network's names "
            f"look like {list(names[:3])}"
        )
