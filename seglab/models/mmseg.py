"""MMSegmentation's checkpoints: their names and layouts, both ways.

Heads have MMSegmentation's names already. Backbones are timm's, so their keys are renamed; besides,
Swin's patch merging orders its input channels differently, and the global attention of Twins
stores query, key and value in one tensor there and in two here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]

# (ours below `encoder.`, theirs below `backbone.`): beginnings of keys, `#` stands for a number.
# The first rule that fits is taken.
SWIN: Rules = (
    ("model.patch_embed.proj", "patch_embed.projection"),
    ("model.patch_embed.norm", "patch_embed.norm"),
    # timm lets a stage begin with its downsampling, MMSegmentation lets it end with the next one's.
    *((f"model.layers.{i + 1}.downsample", f"stages.{i}.downsample") for i in range(3)),
    ("model.layers.#.blocks.#.mlp.fc1", "stages.#.blocks.#.ffn.layers.0.0"),
    ("model.layers.#.blocks.#.mlp.fc2", "stages.#.blocks.#.ffn.layers.1"),
    ("model.layers.#.blocks.#.attn", "stages.#.blocks.#.attn.w_msa"),
    ("model.layers.#.blocks.#", "stages.#.blocks.#"),
    ("norm#", "norm#"),
)
TWINS: Rules = (
    ("model.patch_embeds.#.proj", "patch_embeds.#.projection"),
    ("model.patch_embeds.#.norm", "patch_embeds.#.norm"),
    ("model.pos_block.#.proj.0", "position_encodings.#.proj"),
    ("model.blocks.#.#.mlp.fc1", "layers.#.#.ffn.layers.0.0"),
    ("model.blocks.#.#.mlp.fc2", "layers.#.#.ffn.layers.1"),
    ("model.blocks.#.#", "layers.#.#"),
    ("norm#", "norm_list.#"),
)
CONVNEXT: Rules = (
    ("model.stem", "downsample_layers.0"),
    *((f"model.stages.{i}.downsample", f"downsample_layers.{i}") for i in (1, 2, 3)),
    ("model.stages.#.blocks.#.conv_dw", "stages.#.#.depthwise_conv"),
    ("model.stages.#.blocks.#.mlp.fc1", "stages.#.#.pointwise_conv1"),
    ("model.stages.#.blocks.#.mlp.fc2", "stages.#.#.pointwise_conv2"),
    ("model.stages.#.blocks.#", "stages.#.#"),
    ("norm#", "norm#"),
)
RESNET_V1C: Rules = (
    ("model.bn1", "stem.7"),
    ("model.conv1", "stem"),
    ("model.layer#", "layer#"),
)
FAMILIES: dict[str, Rules] = {
    "timm.models.swin_transformer": SWIN,
    "timm.models.twins": TWINS,
    "timm.models.convnext": CONVNEXT,
    "timm.models.resnet": RESNET_V1C,
}
# A piece of a key that only MMSegmentation's form of the family has.
MARKS = {
    "timm.models.swin_transformer": ".w_msa.",
    "timm.models.twins": "position_encodings.",
    "timm.models.convnext": ".depthwise_conv.",
    "timm.models.resnet": "stem.0.weight",
}
POSITION_INDEX = ".relative_position_index"  # a buffer there, derived here
DERIVED = (POSITION_INDEX, ".attn_mask")


def is_mmseg(state: Mapping[str, Tensor]) -> bool:
    """Say whether keys are those of a whole MMSegmentation network.

    >>> is_mmseg({"backbone.stem.0.weight": torch.zeros(1)})
    True
    """
    return any(key.startswith("backbone.") for key in state)


def is_mmseg_backbone(encoder: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Say whether keys, with or without `backbone.`, are MMSegmentation's for such an encoder.

    >>> from seglab.models import TimmEncoder
    >>> is_mmseg_backbone(TimmEncoder("resnet50c"), {"stem.0.weight": torch.zeros(1)})
    True
    """
    mark = MARKS.get(type(getattr(encoder, "model", None)).__module__)
    return mark is not None and any(mark in key for key in state)


def from_mmseg(network: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Translate a whole MMSegmentation state dict into that of our `Segmenter`.

    Args:
        network: has the `encoder` that the backbone becomes.
        state: keys below `backbone.`, `decode_head.` and `auxiliary_head.`.

    Raises:
        ValueError: keys without a counterpart, or an encoder whose names are not known.
    """
    backbone = _below("backbone.", state)
    encoder = encoder_from_mmseg(_encoder(network), backbone)
    return _above("encoder.", encoder) | _heads(state)


def to_mmseg(network: nn.Module) -> State:
    """Export a `Segmenter` under MMSegmentation's names; its modules load the result strictly.

    Raises:
        ValueError: an encoder whose names are not known.
    """
    state = network.state_dict()
    backbone = encoder_to_mmseg(_encoder(network), _below("encoder.", state))
    return _above("backbone.", backbone) | _heads(state)


def encoder_from_mmseg(encoder: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Translate a backbone's state dict, keys without `backbone.`, into our encoder's."""
    rules = _find_rules(encoder)
    state = {key: value for key, value in state.items() if not key.endswith(DERIVED)}
    if rules is TWINS:
        state = _split_attention(state)
    renamed = _rename(state, [(theirs, ours) for ours, theirs in rules])
    return {
        key: _unpermute(value) if _merges(rules, key) else value for key, value in renamed.items()
    }


def pretrained_from_mmseg(encoder: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Translate a file of pretrained backbone weights, which may hold a classifier, too.

    The classifier and the norm before it are left out. ConvNeXt's files call that norm `norm3`, so
    it becomes the last output norm, as it does in MMSegmentation.
    """
    backbone = _below("backbone.", state) or state
    classifier = ("head.", "fc.", "norm.")
    kept = {key: backbone[key] for key in backbone if not key.startswith(classifier)}
    return encoder_from_mmseg(encoder, kept)


def encoder_to_mmseg(encoder: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Translate our encoder's state dict into a backbone's, keys without `backbone.`."""
    rules = _find_rules(encoder)
    state = {key: _permute(value) if _merges(rules, key) else value for key, value in state.items()}
    renamed = _rename(state, rules)
    if rules is TWINS:
        return _join_attention(renamed)
    tables = [key for key in renamed if key.endswith(".relative_position_bias_table")]
    for key in tables:
        renamed[key.rpartition(".")[0] + POSITION_INDEX] = _position_index(len(renamed[key]))
    return renamed


def _find_rules(encoder: nn.Module) -> Rules:
    model = getattr(encoder, "model", None)
    rules = FAMILIES.get(type(model).__module__)
    if rules is None or (rules is RESNET_V1C and not isinstance(model.conv1, nn.Sequential)):  # type: ignore[union-attr]
        raise ValueError(
            "MMSegmentation's names are known for Swin, Twins-SVT, ConvNeXt and ResNet with deep "
            f"stem (timm's resnet101c), not for {type(model).__name__}"
        )
    return rules


def _rename(state: Mapping[str, Tensor], rules: Iterable[tuple[str, str]]) -> State:
    patterns = [(_pattern(source), target) for source, target in rules]
    renamed = {_translate(key, patterns): value for key, value in state.items()}
    if None in renamed:
        strange = [key for key in state if _translate(key, patterns) is None]
        raise ValueError(f"{len(strange)} keys have no counterpart, such as {strange[:3]}")
    return {key: value for key, value in renamed.items() if key is not None}


def _pattern(source: str) -> re.Pattern[str]:
    return re.compile(re.escape(source).replace(r"\#", r"(\d+)") + r"((?:\.\w+)+)")


def _translate(key: str, patterns: Iterable[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in patterns:
        found = pattern.fullmatch(key)
        if found is not None:
            *numbers, rest = found.groups()
            for number in numbers:
                target = target.replace("#", number, 1)
            return target + rest
    return None


def _merges(rules: Rules, key: str) -> bool:
    return rules is SWIN and ".downsample." in key


def _permute(merged: Tensor) -> Tensor:
    """Reorder the last dimension, 4C, from timm's (corner, channel) to (channel, corner).

    timm's corners come column by column, those of torch's unfold row by row.
    """
    *outputs, width = merged.shape
    corners = merged.reshape(*outputs, 4, width // 4)[..., [0, 2, 1, 3], :]
    return corners.transpose(-1, -2).reshape(merged.shape)


def _unpermute(merged: Tensor) -> Tensor:
    *outputs, width = merged.shape
    corners = merged.reshape(*outputs, width // 4, 4).transpose(-1, -2)
    return corners[..., [0, 2, 1, 3], :].reshape(merged.shape)


def _split_attention(state: Mapping[str, Tensor]) -> State:
    """Split Twins' global attention: one tensor (3C, ...) becomes q (C, ...) and kv (2C, ...)."""
    split: State = {}
    for key, value in state.items():
        if ".attn.attn.in_proj_" in key:
            stem, kind = key.split(".attn.in_proj_")
            width = len(value) // 3
            split[f"{stem}.q.{kind}"], split[f"{stem}.kv.{kind}"] = value[:width], value[width:]
        else:
            split[key.replace(".attn.attn.out_proj.", ".attn.proj.")] = value
    return split


def _join_attention(state: Mapping[str, Tensor]) -> State:
    joined: State = {}
    for key, value in state.items():
        stem, _, kind = key.partition(".attn.q.")
        attention = key.partition(".attn.")[0]
        if kind:
            whole = torch.cat((value, state[f"{stem}.attn.kv.{kind}"]))
            joined[f"{stem}.attn.attn.in_proj_{kind}"] = whole
        elif f"{attention}.attn.q.weight" in state and ".attn.proj." in key:
            joined[key.replace(".attn.proj.", ".attn.attn.out_proj.")] = value
        elif ".attn.kv." not in key:
            joined[key] = value
    return joined


def _position_index(n_offsets: int) -> Tensor:
    """Row of the bias table for each pair of a window's pixels: (side^2, side^2)."""
    side = (int(n_offsets**0.5) + 1) // 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack((rows.flatten(), columns.flatten()))
    down, right = place[:, :, None] - place[:, None, :] + side - 1
    index: Tensor = down * (2 * side - 1) + right
    return index


def _encoder(network: nn.Module) -> nn.Module:
    encoder: nn.Module | None = getattr(network, "encoder", None)
    if encoder is None:
        raise ValueError(f"{type(network).__name__} has no `encoder`: only a Segmenter translates")
    return encoder


def _heads(state: Mapping[str, Tensor]) -> State:
    """Keep the keys of the heads, which are the same in both; `loss_decode` has no weights."""
    return {key: value for key, value in state.items() if key.split(".")[0].endswith("_head")}


def _below(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}


def _above(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + key: value for key, value in state.items()}
