"""Backbone weights from a local file, loudly: everything that does not match is named."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

SHOWN = 8  # names listed per kind of mismatch


def load_backbone(model: nn.Module, name: str, path: Path) -> None:
    """Load a whole backbone from `path` into `model`, the feature extractor of timm's `name`.

    The file may hold timm's names or the original ones that timm itself converts, bare or under
    `state_dict`, `model` and the like. Only what the extractor has no use for (classifier, final
    norm) may be absent.

    Args:
        model: timm model whose parameter names are timm's own.
        name: timm name of the architecture.
        path: `.pth`, `.pt`, `.bin` or `.safetensors`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is unreadable or does not match; names and shapes are listed.
    """
    import timm

    loaded = _read(path)
    whole = timm.create_model(name)
    convert = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    try:
        state: dict[str, Tensor] = convert(loaded, whole) if convert else dict(loaded)
    except Exception as error:  # timm's converters assume their own architecture
        raise ValueError(f"{path} does not hold weights of {name}: {error!r}") from error
    complaints = _mismatches(state, model.state_dict(), whole.state_dict())
    if complaints:
        raise ValueError(f"{path} does not fit {name}: " + "; ".join(complaints))
    model.load_state_dict(
        {key: state[key] for key in model.state_dict() if key in state}, strict=False
    )


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
    state: Mapping[str, Any], needed: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> list[str]:
    counters = "num_batches_tracked"  # absent from files older than the counter
    missing = [key for key in needed if key not in state and not key.endswith(counters)]
    unknown = [key for key in state if key not in known]
    shapes = [
        f"{key} {tuple(state[key].shape)} in the file, {tuple(needed[key].shape)} in the network"
        for key in needed
        if key in state and state[key].shape != needed[key].shape
    ]
    kinds = (("absent", missing), ("unknown", unknown), ("of another shape", shapes))
    return [_list(kind, items) for kind, items in kinds if items]


def _list(kind: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {kind}: {', '.join(items[:SHOWN])}{more}"
