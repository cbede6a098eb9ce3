"""Weights from files: what fits is loaded, what does not is named in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from seglab.checkpoints import load_weights, read_checkpoint, refuse_mismatch


def network(classes: int = 3, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 1), nn.Conv2d(width, classes, 1))


@pytest.mark.parametrize("form", ["plain", "task", "state_dict"])
def test_every_form_of_file_is_read(tmp_path: Path, form: str) -> None:
    source, target = network(), network()
    state = dict(source.state_dict())
    prefixed = {f"network.{key}": value for key, value in state.items()}
    content = {
        "plain": state,
        "task": {"state_dict": {**prefixed, "loss.weight": torch.ones(3)}, "epoch": 3},
        "state_dict": {"state_dict": state},
    }[form]
    torch.save(content, tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt")
    for key, value in target.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize(
    ("extra", "equalized"),
    [
        ({}, False),
        ({"scale_equalized": True}, True),
        ({"callbacks": {"ScaleEqualizationCallback": {"mode": "fold"}}}, True),
        ({"callbacks": {"ScaleEqualizationCallback": {"mode": "off"}}}, False),
    ],
)
def test_file_tells_whether_it_is_equalized(
    tmp_path: Path, extra: dict[str, object], equalized: bool
) -> None:
    torch.save({"state_dict": network().state_dict(), **extra}, tmp_path / "weights.pt")
    assert load_weights(network(), tmp_path / "weights.pt") is equalized


def test_other_classes_take_all_but_the_class_layers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = network(classes=5), network(classes=3)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    fresh = {key: value.clone() for key, value in target.state_dict().items()}
    load_weights(target, tmp_path / "weights.pt")
    for key, value in target.state_dict().items():
        expected = fresh[key] if key.startswith("1.") else source.state_dict()[key]
        assert torch.equal(value, expected)
    assert "but those of the classes (5 -> 3 classes): 1.weight, 1.bias" in caplog.text


def test_resuming_with_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"last.ckpt was made for 5 classes, .* data has 3"):
        refuse_mismatch(
            network(classes=3).state_dict(), network(classes=5).state_dict(), "last.ckpt"
        )


def test_other_network_is_named_with_its_keys(tmp_path: Path) -> None:
    state = {**network(width=6).state_dict(), "extra": torch.zeros(1)}
    del state["1.bias"]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="another network") as caught:
        load_weights(network(), tmp_path / "weights.pt")
    message = str(caught.value)
    assert "1 missing (1.bias)" in message
    assert "1 not known here (extra)" in message
    assert "3 of another shape (0.weight is (6, 3, 1, 1), here (4, 3, 1, 1)" in message


def test_nothing_is_changed_when_something_does_not_fit(tmp_path: Path) -> None:
    target = network()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    torch.save(network(width=6).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="another network"):
        load_weights(target, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.ckpt does not exist"):
        read_checkpoint(tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize("content", [b"no checkpoint", b""])
def test_unreadable_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.ckpt cannot be read"):
        read_checkpoint(tmp_path / "broken.ckpt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("code from the checkpoint ran",))

    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.ckpt")
    with pytest.raises(ValueError, match=r"harmful.ckpt cannot be read"):
        read_checkpoint(tmp_path / "harmful.ckpt")
