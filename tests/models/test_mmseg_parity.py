"""Our networks beside the real MMSegmentation ones: same weights, same input, same numbers.

Skipped unless MMSegmentation can be imported. It is installed beside the project, never into it:

    pip install --no-deps --target DIR mmsegmentation==1.2.2 mmpretrain==1.2.0 mmengine==0.10.7 \
        mmcv-lite==2.1.0 addict yapf termcolor terminaltables prettytable wcwidth ftfy regex
    PYTHONPATH=DIR python -m pytest -c pyproject.toml tests/models/test_mmseg_parity.py -s -m ""

With `-s` each test prints the largest relative error of what it compared.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seglab.losses import CrossEntropy
from seglab.models import Segmenter, TimmEncoder
from seglab.models.heads import ASPPHead, FCNHead, PSPHead, SepASPPHead, UPerHead
from seglab.models.mmseg import encoder_to_mmseg, from_mmseg, to_mmseg

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("mmseg") is None, reason="MMSegmentation is not importable"
    ),
    pytest.mark.filterwarnings("ignore"),
]
NORM = {"type": "BN", "requires_grad": True}
K = 5


class _Stub(types.ModuleType):
    """Stands for compiled operators and command-line helpers that no network here needs."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture(scope="session")
def build() -> Any:
    """MMSegmentation's registry: a config dictionary to a module."""
    absent = ("mmcv._ext", "modelindex", "importlib_metadata", "einops")
    missing = {name for name in absent if importlib.util.find_spec(name) is None}
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
    import mmpretrain.models  # noqa: F401  # registers ConvNeXt
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS

    return MODELS.build


def swin(width: int, depths: tuple[int, ...], heads: tuple[int, ...]) -> dict[str, Any]:
    return {
        "type": "SwinTransformer",
        "embed_dims": width,
        "depths": depths,
        "num_heads": heads,
        "window_size": 7,
        "drop_path_rate": 0.0,
    }


def svt(widths: list[int], depths: list[int], heads: list[int]) -> dict[str, Any]:
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


def convnext(arch: str) -> dict[str, Any]:
    return {
        "type": "mmpretrain.ConvNeXt",
        "arch": arch,
        "out_indices": [0, 1, 2, 3],
        "drop_path_rate": 0.0,
        "layer_scale_init_value": 1.0,
        "gap_before_final_norm": False,
    }


RESNET = {
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
    "swin-t": (swin(96, (2, 2, 6, 2), (3, 6, 12, 24)), "swin_tiny_patch4_window7_224"),
    "swin-s": (swin(96, (2, 2, 18, 2), (3, 6, 12, 24)), "swin_small_patch4_window7_224"),
    "swin-b": (swin(128, (2, 2, 18, 2), (4, 8, 16, 32)), "swin_base_patch4_window7_224"),
    "svt-s": (svt([64, 128, 256, 512], [2, 2, 10, 4], [2, 4, 8, 16]), "twins_svt_small"),
    "svt-b": (svt([96, 192, 384, 768], [2, 2, 18, 2], [3, 6, 12, 24]), "twins_svt_base"),
    "svt-l": (svt([128, 256, 512, 1024], [2, 2, 18, 2], [4, 8, 16, 32]), "twins_svt_large"),
    "convnext-t": (convnext("tiny"), "convnext_tiny"),
    "convnext-s": (convnext("small"), "convnext_small"),
    "convnext-b": (convnext("base"), "convnext_base"),
    "resnet-101": (RESNET, "resnet101c"),
}
LARGE = ("swin-s", "swin-b", "svt-b", "svt-l", "convnext-s", "convnext-b")


def make_encoder(backbone: str) -> TimmEncoder:
    stride = 8 if backbone == "resnet-101" else 32
    return TimmEncoder(BACKBONES[backbone][1], output_stride=stride)


@torch.no_grad()
def scramble(module: nn.Module) -> None:
    """Move what starts at 0 or 1 away from there, so that every parameter matters."""
    torch.manual_seed(0)
    for name, value in module.state_dict().items():
        if name.endswith(("running_var", "gamma")):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point() and (value.ndim == 1 or "position_bias" in name):
            value.add_(0.1 * torch.randn_like(value))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [(64, 64), (225, 301), (512, 683)])
@pytest.mark.parametrize(
    "backbone",
    [pytest.param(b, marks=pytest.mark.slow) if b in LARGE else b for b in BACKBONES],
)
@torch.no_grad()
def test_backbones_give_the_same_features(backbone: str, size: tuple[int, int], build: Any) -> None:
    theirs = build(BACKBONES[backbone][0])
    scramble(theirs)
    theirs.eval()
    ours = make_encoder(backbone).eval()
    network = nn.ModuleDict({"encoder": ours})
    state = {f"backbone.{key}": value for key, value in theirs.state_dict().items()}
    network.load_state_dict(from_mmseg(network, state))
    theirs.load_state_dict(encoder_to_mmseg(ours, ours.state_dict()), strict=True)
    image = torch.randn(1, 3, *size)
    pairs = list(zip(ours(image), theirs(image), strict=True))
    error = max(relative(found, expected) for found, expected in pairs)
    n_own, n_theirs = (sum(p.numel() for p in m.parameters()) for m in (ours, theirs))
    print(f"{backbone} {size}: features {error:.1e}, parameters {n_own:,}")
    assert error < 1e-5
    assert n_own == n_theirs


def head_config(kind: str, channels: list[int]) -> dict[str, Any]:
    shared = {
        "channels": 32,
        "dropout_ratio": 0.0,
        "num_classes": K,
        "norm_cfg": NORM,
        "align_corners": False,
    }
    last = {"in_channels": channels[-1], "in_index": 3}
    own: dict[str, Any] = {
        "UPerHead": {"in_channels": channels, "in_index": [0, 1, 2, 3]},
        "PSPHead": last | {"pool_scales": (1, 2, 3, 6)},
        "ASPPHead": last | {"dilations": (1, 12, 24, 36)},
        "DepthwiseSeparableASPPHead": last
        | {"dilations": (1, 12, 24, 36), "c1_in_channels": channels[0], "c1_channels": 48},
        "FCNHead": last | {"num_convs": 2, "concat_input": True},
    }
    return {"type": kind} | shared | own[kind]


HEADS = {
    "UPerHead": UPerHead,
    "PSPHead": PSPHead,
    "ASPPHead": ASPPHead,
    "DepthwiseSeparableASPPHead": SepASPPHead,
    "FCNHead": FCNHead,
}
SETUPS = [
    ("swin-t", "UPerHead"),
    ("svt-s", "UPerHead"),
    ("convnext-t", "UPerHead"),
    ("resnet-101", "PSPHead"),
    ("resnet-101", "ASPPHead"),
    ("resnet-101", "DepthwiseSeparableASPPHead"),
    ("resnet-101", "FCNHead"),
]


def make_pair(backbone: str, head: str, build: Any) -> tuple[Segmenter, Any]:
    """Our network and theirs with equal weights, in double precision."""
    encoder = make_encoder(backbone)
    auxiliary = {
        "type": "FCNHead",
        "in_channels": encoder.channels[2],
        "in_index": 2,
        "channels": 16,
        "num_convs": 1,
        "concat_input": False,
        "dropout_ratio": 0.0,
        "num_classes": K,
        "norm_cfg": NORM,
        "align_corners": False,
        "loss_decode": {"type": "CrossEntropyLoss", "loss_weight": 0.4},
    }
    from mmengine import ConfigDict

    theirs = build(
        {
            "type": "EncoderDecoder",
            "backbone": BACKBONES[backbone][0],
            "decode_head": head_config(head, list(encoder.channels)),
            "auxiliary_head": auxiliary,
            "train_cfg": {},
            "test_cfg": ConfigDict(mode="whole"),
        }
    )
    scramble(theirs)
    ours = Segmenter(
        encoder,
        partial(HEADS[head], channels=32, dropout=0.0),
        partial(FCNHead, channels=16, dropout=0.0, in_index=2, num_convs=1, concat_input=False),
        K,
    )
    ours.load_state_dict(ours.translate_state(theirs.state_dict()))
    theirs.load_state_dict(to_mmseg(ours), strict=True)
    return ours.double(), theirs.double()


@pytest.mark.parametrize(("backbone", "head"), SETUPS)
def test_networks_agree_in_logits_loss_and_gradients(backbone: str, head: str, build: Any) -> None:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    ours, theirs = make_pair(backbone, head, build)
    image = torch.randint(0, 256, (2, 3, 65, 90), dtype=torch.uint8)
    normalized = ours.normalize(image)
    target = torch.randint(0, K, (2, 65, 90))
    target[:, :9] = 255
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=labels[None]), metainfo={"img_shape": (65, 90)})
        for labels in target
    ]
    ours.eval(), theirs.eval()
    with torch.no_grad():
        metas = [{"ori_shape": (65, 90), "img_shape": (65, 90), "pad_shape": (65, 90)}] * 2
        logits = relative(ours(image), theirs.inference(normalized, metas))
    ours.train(), theirs.train()
    losses = theirs.loss(normalized, samples)
    expected = losses["decode.loss_ce"] + losses["aux.loss_ce"]
    criterion = CrossEntropy()
    main, auxiliary = (
        criterion(nn.functional.interpolate(x, (65, 90), mode="bilinear"), target)
        for x in ours.decode(image)
    )
    loss = main + 0.4 * auxiliary
    expected.backward()
    loss.backward()
    difference = relative(loss.detach(), expected.detach())
    gradients = compare_gradients(ours, theirs)
    print(f"{backbone} {head}: logits {logits:.1e}, loss {difference:.1e}, grads {gradients:.1e}")
    assert max(logits, difference) < 1e-10
    assert gradients < 1e-8


def compare_gradients(ours: Segmenter, theirs: nn.Module) -> float:
    """Largest error of any tensor's gradient, relative to its norm or to 1e-6 of the whole's."""
    own = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    encoder = {k.removeprefix("encoder."): v for k, v in own.items() if k.startswith("encoder.")}
    found = {k: v for k, v in own.items() if not k.startswith("encoder.")}
    renamed = encoder_to_mmseg(ours.encoder, encoder)
    found |= {f"backbone.{key}": value for key, value in renamed.items()}
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    whole = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
    assert all(gradient is not None for gradient in expected.values())
    return max(
        float((found[key] - gradient).norm() / max(gradient.norm(), 1e-6 * whole))
        for key, gradient in expected.items()
        if gradient is not None
    )
