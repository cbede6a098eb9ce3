"""MMSegmentation's own networks of the recipes, to compare with. Prints what it can build.

    python benchmarks/mmseg_reference.py

MMSegmentation 1.2.2 does not install beside a current torch; its Python alone does, without the
compiled operators, which no network here needs (`make test` does this):

    python -m pip install --no-deps -r benchmarks/mmsegmentation.txt
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NORM = {"type": "BN", "requires_grad": True}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class _Stub(types.ModuleType):
    """Stands for compiled operators and command-line helpers that no network here needs."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


_PARTS = ("mmseg", "mmpretrain", "mmengine", "mmcv", "addict", "ftfy", "prettytable", "yapf")


def is_there() -> bool:
    """Whether MMSegmentation can be imported, with all that its networks need."""
    return all(importlib.util.find_spec(part) is not None for part in _PARTS)


def builder() -> Callable[[dict[str, Any]], Any]:
    """MMSegmentation's registry: a config dictionary to a module."""
    absent = ("mmcv._ext", "modelindex", "importlib_metadata", "einops")
    missing = {n for n in absent if n not in sys.modules and importlib.util.find_spec(n) is None}
    stubs = {
        "mmcv._ext": ("mmcv.ops", "mmcv.ops.carafe", "mmcv.ops.point_sample"),
        "modelindex": tuple(
            f"modelindex{part}"
            for part in ("", ".load_model_index", ".models", ".models.Model", ".models.Collection")
        ),
        "einops": ("einops",),
    }
    for name in missing - {"importlib_metadata"}:
        sys.modules.update({stub: _Stub(stub) for stub in stubs[name]})
    if "importlib_metadata" in missing:
        sys.modules["importlib_metadata"] = importlib.metadata
    # Language models, written for a transformers of its time.
    sys.modules.setdefault("mmpretrain.models.multimodal", _Stub("mmpretrain.models.multimodal"))
    import mmpretrain.models  # noqa: F401  # registers ConvNeXt
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS

    build: Callable[[dict[str, Any]], Any] = MODELS.build
    return build


def _swin(width: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> dict[str, Any]:
    return {
        "type": "SwinTransformer",
        "embed_dims": width,
        "depths": depths,
        "num_heads": heads,
        "window_size": 7,
        "drop_path_rate": 0.0,
    }


def _svt(widths: list[int], depths: list[int], heads: list[int]) -> dict[str, Any]:
    return {
        "type": "SVT",
        "embed_dims": widths,
        "num_heads": heads,
        "mlp_ratios": [4, 4, 4, 4],
        "qkv_bias": True,
        "depths": depths,
        "windiow_sizes": [7, 7, 7, 7],
        "norm_after_stage": True,
        "drop_path_rate": 0.0,
        "sr_ratios": [8, 4, 2, 1],
    }


def _convnext(arch: str) -> dict[str, Any]:
    return {
        "type": "mmpretrain.ConvNeXt",
        "arch": arch,
        "out_indices": [0, 1, 2, 3],
        "drop_path_rate": 0.0,
        "layer_scale_init_value": 1.0,
        "gap_before_final_norm": False,
    }


_RESNET = {
    "type": "ResNetV1c",
    "depth": 101,
    "dilations": (1, 1, 2, 4),
    "strides": (1, 2, 1, 1),
    "norm_cfg": NORM,
    "norm_eval": False,
    "style": "pytorch",
    "contract_dilation": True,
}
BACKBONES: dict[str, tuple[dict[str, Any], str]] = {
    "swin-t": (_swin(96, (2, 2, 6, 2), (3, 6, 12, 24)), "swin_tiny_patch4_window7_224"),
    "swin-s": (_swin(96, (2, 2, 18, 2), (3, 6, 12, 24)), "swin_small_patch4_window7_224"),
    "swin-b": (_swin(128, (2, 2, 18, 2), (4, 8, 16, 32)), "swin_base_patch4_window7_224"),
    "svt-s": (_svt([64, 128, 256, 512], [2, 2, 10, 4], [2, 4, 8, 16]), "twins_svt_small"),
    "svt-b": (_svt([96, 192, 384, 768], [2, 2, 18, 2], [3, 6, 12, 24]), "twins_svt_base"),
    "svt-l": (_svt([128, 256, 512, 1024], [2, 2, 18, 2], [4, 8, 16, 32]), "twins_svt_large"),
    "convnext-t": (_convnext("tiny"), "convnext_tiny"),
    "convnext-s": (_convnext("small"), "convnext_small"),
    "convnext-b": (_convnext("base"), "convnext_base"),
    "resnet-101": (_RESNET, "resnet101c"),
}
"""Their config, without drop path, and timm's name."""


def head_config(
    kind: str, in_channels: Sequence[int], n_classes: int, channels: int = 512
) -> dict[str, Any]:
    """The recipes' decode head of a type (their name or ours), without dropout."""
    kind = "DepthwiseSeparableASPPHead" if kind == "SepASPPHead" else kind
    shared = {
        "type": kind,
        "channels": channels,
        "dropout_ratio": 0.0,
        "num_classes": n_classes,
        "norm_cfg": NORM,
        "align_corners": False,
    }
    last = {"in_channels": in_channels[-1], "in_index": 3}
    own: dict[str, Any] = {
        "UPerHead": {"in_channels": list(in_channels), "in_index": [0, 1, 2, 3]},
        "PSPHead": last | {"pool_scales": (1, 2, 3, 6)},
        "ASPPHead": last | {"dilations": (1, 12, 24, 36)},
        "DepthwiseSeparableASPPHead": last
        | {"dilations": (1, 12, 24, 36), "c1_in_channels": in_channels[0], "c1_channels": 48},
        "FCNHead": last | {"num_convs": 2, "concat_input": True},
    }
    return shared | own[kind]


def auxiliary_config(in_channels: Sequence[int], n_classes: int, channels: int) -> dict[str, Any]:
    """The recipes' auxiliary head, without dropout."""
    return head_config("FCNHead", in_channels, n_classes, channels) | {
        "in_channels": in_channels[2],
        "in_index": 2,
        "num_convs": 1,
        "concat_input": False,
        "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4},
    }


def network_config(
    backbone: str, head: dict[str, Any], auxiliary: dict[str, Any], crop: int | None = None
) -> dict[str, Any]:
    """An EncoderDecoder; with a crop size, its data preprocessor is the recipes'."""
    from mmengine import ConfigDict

    config: dict[str, Any] = {
        "type": "EncoderDecoder",
        "backbone": BACKBONES[backbone][0],
        "decode_head": head,
        "auxiliary_head": auxiliary,
        "train_cfg": {},
        "test_cfg": ConfigDict(mode="whole"),
    }
    if crop is not None:
        config["data_preprocessor"] = {
            "type": "mmseg.SegDataPreProcessor",
            "mean": MEAN,
            "std": STD,
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": 255,
            "size": (crop, crop),
        }
    return config


def samples(image: Tensor, target: Tensor) -> dict[str, list[Any]]:
    """What their data loader would give: BGR images and packed labels.

    Args:
        image: RGB, uint8 (B, 3, H, W).
        target: class ids (B, H, W).
    """
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    size = tuple(target.shape[1:])
    packed = [
        SegDataSample(
            gt_sem_seg=PixelData(data=labels[None]),
            metainfo={"img_shape": size, "ori_shape": size, "pad_shape": size},
        )
        for labels in target
    ]
    return {"inputs": list(image.flip(1)), "data_samples": packed}


_NAMES = {
    "swin": "swin/swin-{}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
    "twins_svt": "twins/twins_svt-{}_uperhead_8xb2-160k_ade20k-512x512.py",
    "convnext": "convnext/convnext-{}_upernet_8xb2-amp-160k_ade20k-512x512.py",
    "cityscapes": "{0}/{0}_r101-d8_4xb2-80k_cityscapes-512x1024.py",
    "ade20k": "{0}/{0}_r101-d8_4xb4-160k_ade20k-512x512.py",
}
_SIZES = {"t": "tiny", "s": "small", "b": "base"}


def recipe(data: str, name: str) -> tuple[str, Any]:
    """Path and content of MMSegmentation's own config file for one of `configs/`.

    It has none for VOC with these encoders: then it is that for ADE20K with its own data set
    `pascal_voc12_aug` and 21 classes, in the batches of the encoder's recipe.

    Args:
        data: "ade20k", "voc_aug" or "cityscapes".
        name: file name in `configs/` without its suffix, "upernet_swin_t" or "fcn_r101".
    """
    import mmseg
    from mmengine.config import Config

    home = Path(mmseg.__file__).parent / ".mim/configs"
    family, _, size = name.removeprefix("upernet_").rpartition("_")
    if size == "r101":
        path = _NAMES[data].format(family)
    else:
        path = _NAMES[family].format(size if family == "twins_svt" else _SIZES[size])
    config = Config.fromfile(home / path)
    if data == "voc_aug":
        for head in (config.model.decode_head, config.model.auxiliary_head):
            head.num_classes = 21
        voc = Config.fromfile(home / "_base_/datasets/pascal_voc12_aug.py")
        batch = config.train_dataloader.batch_size
        config.merge_from_dict({key: voc[key] for key in voc if key != "train_dataloader"})
        config.train_dataloader = voc.train_dataloader
        config.train_dataloader.batch_size = batch
    return path, config


def on_one_process(model: Any) -> Any:
    """A recipe's `model` as it can be built here: without weights, or a group to average over."""
    model = copy.deepcopy(model)
    model.pop("pretrained", None)
    model.backbone.pop("init_cfg", None)
    for part in (model.backbone, model.decode_head, model.auxiliary_head):
        if part.get("norm_cfg", {}).get("type") == "SyncBN":
            part.norm_cfg.type = "BN"
    return model


@torch.no_grad()
def scramble(module: nn.Module) -> None:
    """Move what starts at 0 or 1 away from there, so that every parameter matters."""
    torch.manual_seed(0)
    for name, value in module.state_dict().items():
        if name.endswith(("running_var", "gamma")):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and (value.ndim == 1 or "position_bias" in name):
            value.add_(0.1 * torch.randn_like(value))


if __name__ == "__main__":
    build = builder()
    for name, (config, _) in BACKBONES.items():
        n_parameters = sum(p.numel() for p in build(config).parameters())
        print(f"{name:12} {config['type']:22} {n_parameters / 1e6:6.1f} M parameters")
