"""Backbone weights from a local file, loudly: everything that does not match is named."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from seglab.models.mmseg import is_mmseg_backbone, pretrained_from_mmseg

SHOWN = 8  # names listed per kind of mismatch


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
    loaded = _read(path)
    own = encoder.state_dict()
    known = set(own)
    try:
        if is_mmseg_backbone(loaded):
            state = pretrained_from_mmseg(encoder, loaded)
        else:
            state, whole = _from_timm(name, loaded)
            known |= whole
    except Exception as error:  # timm's converters assume their own architecture
        raise ValueError(f"{path} does not hold weights of {name}: {error}") from error
    complaints = _mismatches(state, own, known)
    if complaints:
        raise ValueError(f"{path} does not fit {name}: " + "; ".join(complaints))
    encoder.load_state_dict({key: state[key] for key in own if key in state}, strict=False)


def _from_timm(name: str, loaded: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Return the weights under the encoder's names, and all names the whole network has."""
    import timm

    whole = timm.create_model(name)
    convert = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    state = convert(loaded, whole) if convert else loaded
    return {f"model.{key}": state[key] for key in state}, {f"model.{k}" for k in whole.state_dict()}


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
