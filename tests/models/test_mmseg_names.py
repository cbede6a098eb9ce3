"""Keys and layouts of MMSegmentation's checkpoints, written down from its modules."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seglab.checkpoints import load_weights
from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import FCNHead, UPerHead
from seglab.models.mmseg import (
    encoder_from_mmseg,
    encoder_to_mmseg,
    from_mmseg,
    to_mmseg,
)

ENCODERS = {
    "swin": "swin_tiny_patch4_window7_224",
    "twins": "twins_svt_small",
    "convnext": "convnext_tiny",
    "resnet": "resnet50c",
}
# Some keys of each backbone with their shapes, as MMSegmentation 1.2.2 has them.
THEIRS: dict[str, dict[str, tuple[int, ...]]] = {
    "swin": {
        "patch_embed.projection.weight": (96, 3, 4, 4),
        "stages.0.blocks.1.attn.w_msa.qkv.weight": (288, 96),
        "stages.2.blocks.5.attn.w_msa.relative_position_bias_table": (169, 12),
        "stages.3.blocks.1.attn.w_msa.relative_position_index": (49, 49),
        "stages.1.blocks.0.ffn.layers.0.0.weight": (768, 192),
        "stages.1.blocks.0.ffn.layers.1.bias": (192,),
        "stages.0.downsample.reduction.weight": (192, 384),
        "stages.2.downsample.norm.weight": (1536,),
        "norm3.weight": (768,),
    },
    "twins": {
        "patch_embeds.3.projection.weight": (512, 256, 2, 2),
        "position_encodings.2.proj.weight": (256, 1, 3, 3),
        "layers.0.0.attn.qkv.weight": (192, 64),
        "layers.0.0.attn.proj.bias": (64,),
        "layers.0.1.attn.attn.in_proj_weight": (192, 64),
        "layers.0.1.attn.attn.in_proj_bias": (192,),
        "layers.0.1.attn.attn.out_proj.weight": (64, 64),
        "layers.0.1.attn.sr.weight": (64, 64, 8, 8),
        "layers.3.3.ffn.layers.1.weight": (512, 2048),
        "norm_list.0.bias": (64,),
    },
    "convnext": {
        "downsample_layers.0.0.weight": (96, 3, 4, 4),
        "downsample_layers.3.1.weight": (768, 384, 2, 2),
        "stages.2.8.depthwise_conv.weight": (384, 1, 7, 7),
        "stages.0.0.pointwise_conv1.weight": (384, 96),
        "stages.0.0.pointwise_conv2.bias": (96,),
        "stages.3.2.gamma": (768,),
        "norm0.weight": (96,),
    },
    "resnet": {
        "stem.0.weight": (32, 3, 3, 3),
        "stem.4.running_var": (32,),
        "stem.6.weight": (64, 32, 3, 3),
        "stem.7.weight": (64,),
        "layer1.0.downsample.1.num_batches_tracked": (),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
    },
}


@pytest.fixture(scope="module", params=ENCODERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def encoder(family: str) -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder(ENCODERS[family])


def test_exported_keys_and_shapes_are_theirs(family: str, encoder: TimmEncoder) -> None:
    exported = encoder_to_mmseg(encoder, encoder.state_dict())
    found = {key: tuple(exported[key].shape) for key in THEIRS[family]}
    assert found == THEIRS[family]
    n_own = sum(value.numel() for value in encoder.state_dict().values())
    n_index = sum(v.numel() for k, v in exported.items() if k.endswith("position_index"))
    assert sum(value.numel() for value in exported.values()) == n_own + n_index


def test_export_and_import_are_inverse(encoder: TimmEncoder) -> None:
    state = encoder.state_dict()
    back = encoder_from_mmseg(encoder, encoder_to_mmseg(encoder, state))
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_patch_merging_follows_the_order_of_unfold() -> None:
    encoder = TimmEncoder(ENCODERS["swin"])
    merging = encoder.model.layers[1].downsample
    torch.nn.init.normal_(merging.norm.weight)
    theirs = encoder_to_mmseg(encoder, encoder.state_dict())
    x = torch.randn(1, 6, 4, 96)
    columns = torch.nn.functional.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2)
    prefix = "stages.0.downsample."
    normed = torch.nn.functional.layer_norm(
        columns.transpose(1, 2),
        (384,),
        theirs[prefix + "norm.weight"],
        theirs[prefix + "norm.bias"],
    )
    expected = normed @ theirs[prefix + "reduction.weight"].T
    torch.testing.assert_close(merging(x).flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_position_index_is_that_of_timm() -> None:
    encoder = TimmEncoder(ENCODERS["swin"])
    exported = encoder_to_mmseg(encoder, encoder.state_dict())
    index = exported["stages.0.blocks.0.attn.w_msa.relative_position_index"]
    assert torch.equal(index, encoder.model.layers[0].blocks[0].attn.relative_position_index)


@pytest.fixture(scope="module")
def network() -> Segmenter:
    torch.manual_seed(0)
    auxiliary = partial(FCNHead, channels=8, in_index=2, num_convs=1, concat_input=False)
    return Segmenter(TimmEncoder("resnet50c"), partial(UPerHead, channels=8), auxiliary, 5)


def scrambled(network: Segmenter) -> dict[str, Tensor]:
    """Weights of the network under their names, all changed."""
    return {
        key: value + 1 if value.is_floating_point() else value
        for key, value in to_mmseg(network).items()
    }


def test_whole_checkpoints_load(network: Segmenter, tmp_path: Path) -> None:
    state = scrambled(network)
    assert {key.split(".")[0] for key in state} == {"backbone", "decode_head", "auxiliary_head"}
    path = tmp_path / "theirs.pth"
    torch.save({"meta": {}, "state_dict": state}, path)
    load_weights(network, path)
    assert torch.equal(network.decode_head.conv_seg.bias, state["decode_head.conv_seg.bias"])
    assert torch.equal(network.encoder.model.conv1[6].weight, state["backbone.stem.6.weight"])


def test_networks_translate_foreign_checkpoints_only(network: Segmenter) -> None:
    own = network.state_dict()
    assert network.translate_state(own) is own
    assert network.translate_state(to_mmseg(network)).keys() == own.keys()


def test_backbone_files_of_mmsegmentation_load_into_encoders(tmp_path: Path) -> None:
    source = TimmEncoder("convnext_tiny")
    with torch.no_grad():
        source.norm3.weight.fill_(3)
    theirs = encoder_to_mmseg(source, source.state_dict())
    pretrained = {k: v for k, v in theirs.items() if not k.startswith(("norm0", "norm1", "norm2"))}
    path = tmp_path / "convnext.pth"
    state = {f"backbone.{key}": value for key, value in pretrained.items()}
    torch.save({"state_dict": state | {"head.fc.weight": torch.zeros(1)}}, path)
    encoder = TimmEncoder("convnext_tiny", checkpoint_path=path)
    assert torch.equal(encoder.norm3.weight, source.norm3.weight)
    for key, value in source.model.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[key], value), key


def test_what_has_no_counterpart_is_named(network: Segmenter, tmp_path: Path) -> None:
    state = to_mmseg(network)
    with pytest.raises(ValueError, match=r"1 keys have no counterpart.*'strange\.weight'"):
        from_mmseg(network, state | {"backbone.strange.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"known for Swin.*not for ResNet"):
        encoder_to_mmseg(plain := TimmEncoder("resnet18"), plain.state_dict())
    path = tmp_path / "theirs.pth"
    torch.save(state | {"backbone.strange.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"theirs\.pth is of another network.*strange\.weight"):
        load_weights(network, path)
    del state["decode_head.conv_seg.bias"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"is of another network.*conv_seg\.bias"):
        load_weights(network, path)
