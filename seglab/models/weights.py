"""Backbone weights from timm or a local file, loudly: everything that does not match is named."""

from __future__ import annotations

import sys
from collections.abc import Collection, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from seglab.models.mmseg import is_mmseg_backbone, pretrained_from_mmseg

SHOWN = 8  # names listed per kind of mismatch


def load_pretrained(encoder: nn.Module, name: str) -> None:
    """Load timm's own weights of `name`, in place; they are fetched once and kept in its cache.

    Args:
        encoder: has the timm model, with timm's own parameter names, as `model`.
        name: timm name of the architecture, with or without a weights tag.

    Raises:
        ValueError: timm has none or cannot fetch them.
    """
    import timm

    try:
        whole = timm.create_model(name, pretrained=True, **_bands(encoder))
    except Exception as error:  # the hub's client has a dozen kinds
        raise ValueError(
            f"timm's weights of {name} cannot be had ({error}): give the path of a copy as "
            "checkpoint_path, or train from scratch with pretrained false"
        ) from error
    state = _for_encoder(whole, whole.state_dict())
    _adopt(encoder, state, set(state), f"timm's weights of {name}")


def load_backbone(encoder: nn.Module, name: str, path: Path) -> None:
    """Load a whole backbone from `path` into an encoder around timm's `name`, in place.

    The file may hold timm's names, the original ones that timm itself converts, or those of
    MMSegmentation; bare or under `state_dict`, `model` and the like. Only what the encoder has no
    use for (classifier, final norm) and the norms on its outputs may be absent.

    Args:
        encoder: has the timm model, with timm's own parameter names, as `model`.
        name: timm name of the architecture.
        path: `.pth`, `.pt`, `.bin` or `.safetensors`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is unreadable or does not match; names and shapes are listed.
    """
    import timm

    loaded = _read(path)
    whole = timm.create_model(name, **_bands(encoder))
    convert = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    try:
        if is_mmseg_backbone(encoder, loaded):
            state = pretrained_from_mmseg(encoder, loaded)
        else:
            state = _for_encoder(whole, convert(loaded, whole) if convert else loaded)
    except Exception as error:  # converters assume their own architecture
        raise ValueError(f"{path} does not hold weights of {name}: {error}") from error
    adapted = _adapt_bands(whole, state)
    _adopt(encoder, adapted, set(_for_encoder(whole, whole.state_dict())), f"{path}")


def _bands(encoder: nn.Module) -> dict[str, int]:
    in_channels = int(getattr(encoder, "in_channels", 3))
    return {} if in_channels == 3 else {"in_chans": in_channels}


def _adapt_bands(whole: Any, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Bring the first convolution of RGB weights to the number of bands that `whole` takes."""
    from timm.models import adapt_input_conv

    names = whole.pretrained_cfg.get("first_conv") or ()
    adapted = dict(state)
    for name in (names,) if isinstance(names, str) else names:
        key, own = f"model.{name}.weight", whole.get_parameter(f"{name}.weight")
        if key in state and state[key].shape[1] == 3 != own.shape[1]:
            adapted[key] = adapt_input_conv(own.shape[1], state[key])
    return adapted


def _for_encoder(whole: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put timm's names below `model.`; ConvNeXt's norm before the classifier is `norm3` as well.

    MMSegmentation's files call it so, and its output norm of that name therefore starts from it.
    """
    named = {f"model.{key}": value for key, value in state.items()}
    if type(whole).__module__ == "timm.models.convnext":
        last = "model.head.norm."
        named |= {f"norm3.{k[len(last) :]}": named[k] for k in list(named) if k.startswith(last)}
    return named


def _adopt(
    encoder: nn.Module, state: Mapping[str, Tensor], known: Collection[str], source: str
) -> None:
    own = encoder.state_dict()
    complaints = _mismatches(state, own, {*known, *own})
    if complaints:
        raise ValueError(f"{source} does not fit: " + "; ".join(complaints))
    encoder.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def _read(path: Path) -> Mapping[str, Tensor]:
    from timm.models import load_state_dict

    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}: give the path of a .pth or .safetensors file"
        )
    try:
        state: Mapping[str, Tensor] = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    return state


def _mismatches(
    state: Mapping[str, Any], own: Mapping[str, Tensor], known: Container[str]
) -> list[str]:
    counters = "num_batches_tracked"  # absent from files older than the counter
    needed = [key for key in own if key.startswith("model.") and not key.endswith(counters)]
    missing = [key for key in needed if key not in state]
    unknown = [key for key in state if key not in known]
    shapes = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    kinds = (("absent", missing), ("unknown", unknown), ("of another shape", shapes))
    return [_list(kind, items) for kind, items in kinds if items]


def _list(kind: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {kind}: {', '.join(items[:SHOWN])}{more}"
