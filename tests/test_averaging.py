"""The snippets of docs/runs.md, run as they stand, against averages made from recorded weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from tiny_experiment import TINY
from torch import Tensor

from seglab.averaging import CheckpointAveraging

PAGE = Path(__file__).parents[1] / "docs/runs.md"
State = dict[str, Tensor]


def snippets() -> dict[str, dict[str, Any]]:
    """The page's YAML blocks by the class that each one names."""
    section = PAGE.read_text().partition("## Averaged weights")[2].partition("\n## ")[0]
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", section, re.S)]
    return {block["trainer"]["callbacks"][0]["class_path"]: block for block in blocks}


EMA, MEAN, STOP = "EMAWeightAveraging", "seglab.averaging.CheckpointAveraging", "EarlyStopping"


class Recorder(Callback):
    """Keeps what the weights are after every step; the tests' own eyes."""

    seen: list[State] = []  # noqa: RUF012
    validated: list[State] = []  # noqa: RUF012

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(copy.deepcopy(pl_module.network.state_dict()))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.validated.append(copy.deepcopy(pl_module.network.state_dict()))


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from seglab.cli import experiment

    defaults = experiment._default_callbacks
    monkeypatch.setattr(
        experiment, "_default_callbacks", lambda *args: [*defaults(*args), Recorder()]
    )
    Recorder.seen, Recorder.validated = [], []
    yield
    Recorder.seen, Recorder.validated = [], []


@pytest.fixture
def train(run: Callable[..., None], tmp_path: Path) -> Callable[..., Path]:
    """Fit the tiny config with a snippet of the page below it."""

    def train(kind: str, *args: object, name: str = "a", **numbers: object) -> Path:
        config, snippet = copy.deepcopy(TINY), copy.deepcopy(snippets()[kind])
        snippet["trainer"]["callbacks"][0]["init_args"] |= numbers
        config["trainer"] |= snippet["trainer"]
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        run("fit", "--config", path, "--trainer.default_root_dir", tmp_path, *args)
        return tmp_path / name / "version_0"

    return train


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def network_of(state: State) -> State:
    prefix = "network."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if found[name].is_floating_point():  # not a count of batches
            torch.testing.assert_close(found[name], value.float(), rtol=1e-5, atol=1e-6, msg=name)


def moving_average(states: list[State], decay: float) -> State:
    """In float64: the first weights, then decay times itself and the rest of the new ones."""
    average = {k: v.double() for k, v in states[0].items()}
    for state in states[1:]:
        average = {k: decay * average[k] + (1 - decay) * state[k].double() for k in average}
    return average


def mean(states: list[State]) -> State:
    return {k: torch.stack([s[k].double() for s in states]).mean(0) for k in states[0]}


def test_moving_average_is_validated_and_kept(
    train: Callable[..., Path],
    run: Callable[..., None],
    logged: Callable[..., list[float]],
    tmp_path: Path,
) -> None:
    folder = train(EMA, decay=0.5)  # the page's hardly moves in four steps
    report = json.loads((folder / "scale_equalization.json").read_text())
    assert report["mode"] == "fold"
    assert not [note for note in report["notes"] if "copy" in note or "average" in note]
    assert len(Recorder.seen) == 4
    averages = [moving_average(Recorder.seen[:n], 0.5) for n in (2, 4)]
    seen = list(Recorder.validated)
    assert_same(seen[0], averages[0])
    assert_same(seen[-1], averages[1])
    last = load(folder / "checkpoints/last.ckpt")
    assert_same(network_of(last["state_dict"]), averages[1])
    assert_same(network_of(last["current_model_state"]), Recorder.seen[-1])
    best = load(folder / "checkpoints/best.ckpt")
    mious = logged(folder, "val/mIoU")
    assert_same(network_of(best["state_dict"]), averages[mious.index(max(mious))])
    path = folder / "checkpoints/best.ckpt"
    args = ("--trainer.accelerator", "cpu", "--trainer.default_root_dir", tmp_path / "again")
    run("validate", "--ckpt_path", path, *args)
    (found,) = (tmp_path / "again").rglob("results.json")
    assert json.loads(found.read_text())["mIoU"] == pytest.approx(max(mious), abs=1e-7)


@pytest.mark.parametrize("kind", [EMA, pytest.param(MEAN, marks=pytest.mark.slow)])
def test_averaging_run_resumes_exactly(train: Callable[..., Path], kind: str) -> None:
    numbers = {"decay": 0.5} if kind == EMA else {"every_n_steps": 1, "starting_at_step": 2}
    whole = load(train(kind, name="whole", **numbers) / "checkpoints/last.ckpt")
    schedule = ("--model.scheduler.init_args.total_steps", 4)
    first = train(kind, "--trainer.max_epochs", 1, *schedule, name="first", **numbers)
    path = first / "checkpoints/last.ckpt"
    more = train(kind, *schedule, "--ckpt_path", path, name="more", **numbers)
    resumed = load(more / "checkpoints/last.ckpt")
    for part in ("state_dict", "current_model_state"):
        for name, value in whole[part].items():
            assert torch.equal(resumed[part][name], value), (part, name)


def test_mean_of_checkpoints_counts_each_once(train: Callable[..., Path]) -> None:
    folder = train(MEAN, every_n_steps=2, starting_at_step=2)
    expected = mean([Recorder.seen[1], Recorder.seen[3]])
    assert_same(network_of(load(folder / "checkpoints/last.ckpt")["state_dict"]), expected)
    assert_same(Recorder.validated[0], Recorder.seen[1])
    assert_same(Recorder.validated[-1], expected)


def test_average_that_has_not_begun_is_the_network_itself(train: Callable[..., Path]) -> None:
    folder = train(MEAN)  # as on the page: from step 60,000 on
    assert_same(Recorder.validated[0], Recorder.seen[1])
    assert_same(Recorder.validated[-1], Recorder.seen[3])
    assert_same(network_of(load(folder / "checkpoints/last.ckpt")["state_dict"]), Recorder.seen[3])


@pytest.mark.parametrize("numbers", [(0, 5), (5, 0)])
def test_steps_below_one_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="count optimizer steps from 1"):
        CheckpointAveraging(*numbers)


def test_early_stopping_ends_after_the_stated_patience(
    train: Callable[..., Path], logged: Callable[..., list[float]]
) -> None:
    schedule = ("--model.scheduler.init_args.total_steps", 40, "--trainer.max_epochs", 20)
    # Nothing is better by 2: the first validation is the best, ten more are waited for.
    folder = train(STOP, *schedule, min_delta=2.0)
    assert len(logged(folder, "val/mIoU")) == 11
    last = load(folder / "checkpoints/last.ckpt")
    assert last["global_step"] == 22
    assert_same(network_of(last["state_dict"]), Recorder.seen[21])


def test_all_snippets_of_the_page_run_together(train: Callable[..., Path], tmp_path: Path) -> None:
    assert set(snippets()) == {EMA, MEAN, STOP}
    folder = train(STOP, "--trainer.callbacks+", EMA, "--trainer.callbacks.decay", 0.999)
    assert load(folder / "checkpoints/best.ckpt")["global_step"] in (2, 4)
    assert "EMAWeightAveraging" in (folder / "config.yaml").read_text()
