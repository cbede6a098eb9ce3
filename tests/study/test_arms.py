"""Arms: built in, from files, crossed with values."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from seglab.study.arms import StudyError, read_arms, vary

CONFIG = {"model": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}}


def test_every_arm_is_crossed_with_every_value() -> None:
    variations = ["model.optimizer.lr=1e-3,0.003", "trainer.precision=[bf16-mixed, 32-true]"]
    arms = vary(read_arms(["off", "fold"]), variations, CONFIG)
    assert list(arms)[:3] == [
        "off,lr=0.001,precision=bf16-mixed",
        "off,lr=0.001,precision=32-true",
        "off,lr=0.003,precision=bf16-mixed",
    ]
    assert len(arms) == 8
    assert arms["fold,lr=0.003,precision=32-true"] == {
        "scale_equalization": {"mode": "fold"},
        "model": {"optimizer": {"init_args": {"lr": 0.003}}},
        "trainer": {"precision": "32-true"},
    }


def test_init_args_may_be_left_out_of_arms() -> None:
    config = {"data": "seglab.data.ScenesDataModule", **CONFIG}
    arms = {"a": {"data": {"seed": 5}, "model": {"optimizer": {"lr": 1.0}, "weights": "x"}}}
    assert vary(arms, [], config)["a"] == {
        "data": {"init_args": {"seed": 5}},
        "model": {"optimizer": {"init_args": {"lr": 1.0}}, "weights": "x"},
    }
    other = {"a": {"data": {"class_path": "other.Data", "init_args": {"x": 1}}}}
    assert vary(other, [], config) == other


def test_variations_of_one_name_keep_their_keys() -> None:
    arms = vary({"x": {}}, ["a.lr=1", "b.lr=2"], {})
    assert list(arms) == ["x,a.lr=1,b.lr=2"]


def test_file_brings_sections_and_built_in_arms(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("off: placebo\nhead: {model: {network: {init_args: {x: 1}}}}\nsame:\n")
    arms = read_arms(["fold", str(path)])
    assert list(arms) == ["fold", "off", "head", "same"]
    assert arms["off"] == read_arms(["placebo"])["placebo"]
    assert arms["same"] == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a/b": {}}, "'a/b' in .* cannot be the name of a folder"),
        ({"..": {}}, "'..' in .* cannot be the name of a folder"),
        ({"a" * 101: {}}, "cannot be the name of a folder: at most 100"),
        ({"a": [1]}, "a in .* must hold sections"),
        ({"a": "folded"}, "or be the name of a built-in arm; it is 'folded'"),
        ([], "must map names of arms"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, content: object, words: str) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(StudyError, match=words):
        read_arms([str(path)])


def test_names_in_a_file_are_as_written(tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text("0: &same {model: {auxiliary_weight: 0}}\n1: fold\n1.0: *same\nno:\n")
    arms = read_arms([str(path)])
    assert list(arms) == ["0", "1", "1.0", "no"]
    assert arms["1.0"] == {"model": {"auxiliary_weight": 0}}
    path.write_text("a: fold\nb:\na: placebo\n")  # YAML would keep the last
    with pytest.raises(StudyError, match="a is given twice in"):
        read_arms([str(path)])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["fodl"], "there is no arm 'fodl'; there are off, fold"),
        (["off", "off"], "off is given twice"),
        (["none.yaml"], "there is no file none.yaml"),
    ],
)
def test_unknown_arms_are_refused(given: list[str], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        read_arms(given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model.lr", "write KEY=VALUE"),
        ("model.lr=1,1", "given twice"),
        ("model.lr=[1,2", "are no YAML list"),
        ("data.root=a/b", "cannot be the name of a folder"),
    ],
)
def test_variations_of_another_form_are_refused(text: str, words: str) -> None:
    with pytest.raises(StudyError, match=words):
        vary({"off": {}}, [text], {})
