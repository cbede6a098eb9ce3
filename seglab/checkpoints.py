"""Load the weights of a whole network from a file; one sentence where they do not fit."""

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seglab.sentences import listed

_log = logging.getLogger(__name__)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it (`weights_only`), on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a checkpoint that torch can read safely.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: check the path.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint {path} {_fault(path, error)}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"checkpoint {path} holds a {type(content).__name__}, not a dictionary of weights."
        )
    return content


def read_step(path: Path) -> int:
    """Optimizer steps after which a run wrote a checkpoint; the weights are not read.

    Raises:
        ValueError: It is unreadable, or no run's.
    """
    if path.is_dir():
        raise ValueError(
            f"checkpoint {path} is a folder, written by a strategy that shards: continue it with "
            "--ckpt_path and the config."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"checkpoint {path} {_fault(path, error)}") from error
    if not isinstance(content, dict) or "global_step" not in content or "loops" not in content:
        raise ValueError(f"checkpoint {path} was not written by a training run.")
    return int(content["global_step"])


def _fault(path: Path, error: Exception) -> str:
    """What is wrong with a file that cannot be loaded."""
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"  # a zip file, as torch writes since 1.6
    if is_archive and not zipfile.is_zipfile(path):  # its list of contents comes last
        size = path.stat().st_size
        return f"cannot be read: it is cut short after {size:,} bytes; copy it again."
    if not path.stat().st_size:
        return "cannot be read: it is empty; take an earlier one."
    reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".:")
    return f"cannot be read, so it is no checkpoint or not one to be trusted: {reason}."


def require_resumable(path: str | Path, is_training: bool) -> dict[str, Any]:
    """Read a checkpoint that a run is to start from, and see that it was written by one.

    Args:
        path: Given to `--ckpt_path`.
        is_training: Whether optimizer and counters are wanted too.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is unreadable, or holds weights only or something else.
    """
    content = read_checkpoint(path)
    wanted = ["state_dict", "pytorch-lightning_version"]
    wanted += ["loops", "optimizer_states", "callbacks"] if is_training else []
    if missing := [key for key in wanted if key not in content]:
        raise ValueError(
            f"checkpoint {path} was not written by a training run (it has no {listed(missing)}): "
            "start from its weights with --model.weights."
        )
    return content


def load_weights(network: nn.Module, path: str | Path) -> bool:
    """Initialise a network from a file, every key exactly once.

    Layers that make one output per class are left at their initial values, and named, where the
    file was trained with another number of classes and differs in nothing else.

    Args:
        network: Changed in place.
        path: A checkpoint of this program, a file with the network's own state dict, or one with
            foreign names that the network's `translate_state` knows.

    Returns:
        Whether the file says that the scales of its fusions are equalized already.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is unreadable, or a key is missing, left over or of another shape.
    """
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    # A checkpoint holds the whole task: the network is one part of it, the loss may be another.
    prefix = "network."
    if any(key.startswith(prefix) for key in state):
        state = {key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)}
    state = _translate(network, state, path)
    own = network.state_dict()
    new = _class_layers(own, state)
    refuse_mismatch(own, {**state, **{key: own[key] for key in new}}, f"checkpoint {path}")
    network.load_state_dict({key: own[key] if key in new else state[key] for key in own})
    if new:
        counts = f"{state[new[0]].shape[0]} -> {own[new[0]].shape[0]} classes"
        _log.warning(
            f"{path}: all weights taken but those of the classes ({counts}): {listed(new)}"
        )
    return _is_equalized(content)


def _class_layers(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Keys that differ in their number of outputs alone, by one pair of numbers; else none."""
    keys = _differing(own, found)
    pairs = {(own[key].shape[0], found[key].shape[0]) for key in keys if own[key].ndim}
    if len(pairs) == 1 and all(_differs_in_classes(own[key], found[key]) for key in keys):
        return keys
    return []


def _is_equalized(content: Mapping[str, Any]) -> bool:
    """True for the file of `train.py equalize` and the checkpoints of equalized runs."""
    callback = content.get("callbacks", {}).get("ScaleEqualizationCallback", {})
    return bool(content.get("scale_equalized")) or callback.get("mode", "off") != "off"


def _translate(
    network: nn.Module, state: Mapping[str, Tensor], path: str | Path
) -> Mapping[str, Tensor]:
    translate = getattr(network, "translate_state", None)
    if translate is None:
        return state
    try:
        translated: Mapping[str, Tensor] = translate(state)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} is of another network: {error}") from error
    return translated


def refuse_mismatch(own: Mapping[str, Tensor], found: Mapping[str, Any], source: str) -> None:
    """Compare keys and shapes before any weight is copied.

    Args:
        own: State dict of the module that is to be filled.
        found: State dict that is to fill it.
        source: How the message calls the latter.

    Raises:
        ValueError: They differ; a wrong number of classes is recognised as such.
    """
    shapes = [
        f"{key} is {tuple(found[key].shape)}, here {tuple(own[key].shape)}"
        for key in own
        if key in found and found[key].shape != own[key].shape
    ]
    if classes := _class_layers(own, found):
        key = classes[0]
        raise ValueError(
            f"{source} was made for {found[key].shape[0]} classes, but the data has"
            f" {own[key].shape[0]} ({shapes[0]}): use the data it was trained on, or start from"
            " its weights with --model.weights."
        )
    missing = [key for key in own if key not in found]
    unknown = [key for key in found if key not in own]
    kinds = (("missing", missing), ("not known here", unknown), ("of another shape", shapes))
    complaints = [_count(kind, items) for kind, items in kinds if items]
    if complaints:
        raise ValueError(
            f"{source} is of another network: {'; '.join(complaints)}."
            " Use the model section it was trained with."
        )


def _differing(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Keys of both whose shapes differ."""
    return [key for key in own if key in found and found[key].shape != own[key].shape]


def _differs_in_classes(own: Tensor, found: Tensor) -> bool:
    """Whether only the first dimension, that of a classifier's outputs, differs."""
    return own.ndim == found.ndim > 0 and own.shape[1:] == found.shape[1:]


def _count(kind: str, items: list[str]) -> str:
    return f"{len(items)} {kind} ({listed(items)})"
